"""MLflow on SQLite, and an MLflow server that is killed in the middle of a run."""

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from mlflow import MlflowClient

from hyperscale.config.tracking import TrackingSettings
from hyperscale.errors import ConfigError, RunFolderError
from hyperscale.places import open_place
from hyperscale.tracking.trackers import record_end, track
from hyperscale.training.callbacks import CheckpointRecord, RunOutcome
from tests.mlflow_server import free_port, kill_group, mlflow_server
from tests.tracked import Recorded, make_evaluation, make_facts

# MLflow 3.17 under SQLAlchemy 2.1.
pytestmark = pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")
TAGS = {"git_commit": "f" * 40, "version.torch": "2.13"}


def history(client: MlflowClient, run_id: str, key: str) -> list[tuple[int, float]]:
    return sorted((metric.step, metric.value) for metric in client.get_metric_history(run_id, key))


def run_id_of(run: Recorded) -> str:
    return str(run.state()["mlflow"]["run_id"])


class FailedRun:
    """A run on SQLite that failed at step 5, seen from another working directory."""

    def __init__(self, root: Path) -> None:
        self.root, self.folder = root / "runs", root / "runs" / "demo"
        self.settings = {"mlflow": {"experiment": "team / demo", "tags": {"owner": "me"}, "log_system_metrics": True}}
        run = Recorded(self.folder, self.settings, tags=TAGS)
        run.start(recipe=make_facts(self.folder).recipe | {"tracking": self.settings})
        run.call("on_evaluation", make_evaluation(0, "majority", 50.0))
        run.call("on_evaluation", make_evaluation(0, "untouched", 40.0))
        run.step(1, 2, 3, 4, 5)
        run.call("on_evaluation", make_evaluation(5))
        run.call("on_checkpoint", CheckpointRecord(5, "checkpoints/step-000005"))
        self.state = run.state()
        run.end(RunOutcome("failed", 5, 3.0, message="worker killed"))
        self.client = MlflowClient(tracking_uri=f"sqlite:///{self.root}/mlflow.db")
        self.run_id = str(self.state["mlflow"]["run_id"])

    def read(self) -> Any:
        return self.client.get_run(self.run_id)


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FailedRun]:
    root = tmp_path_factory.mktemp("failed")
    elsewhere, before = root / "elsewhere", Path.cwd()
    elsewhere.mkdir()
    os.chdir(elsewhere)
    try:
        yield FailedRun(root)
        assert list(elsewhere.iterdir()) == []
    finally:
        os.chdir(before)


def test_a_failed_run_has_its_status_name_and_tags(failed: FailedRun) -> None:
    run = failed.read()
    assert (run.info.status, run.info.run_name) == ("FAILED", "demo")
    tags = run.data.tags
    assert tags["mlflow.source.git.commit"] == "f" * 40
    assert (tags["owner"], tags["version.torch"]) == ("me", "2.13")
    assert tags["hyperscale.message"] == "worker killed"
    assert tags["hyperscale.checkpoint"] == "checkpoints/step-000005"


def test_parameters_are_the_flat_recipe(failed: FailedRun) -> None:
    params = failed.read().data.params
    assert params["training.steps"] == "100"
    assert params["adaptation.adapters.0.kind"] == "lora"
    assert len(params["training.note"]) == 6000


def test_metrics_have_their_stable_names(failed: FailedRun) -> None:
    expected = {
        "train/loss": 0.2,
        "train/sst2/loss": 0.1,
        "train/word_pairs_/loss": 0.3,
        "eval/sst2/accuracy": 80.0,
        "eval/sst2/f1": 79.0,
        "eval/word_pairs_/exact_match": 60.0,
        "eval/mean": 70.0,
        "untouched/mean": 30.0,
        "majority/sst2/accuracy": 50.0,
        "throughput/tokens_per_second": 2048.0,
        "model/trained_parameters": 1000,
        "model/total_parameters": 100_000,
    }
    metrics = failed.read().data.metrics
    assert {key: metrics[key] for key in expected} == pytest.approx(expected)


def test_data_sets_and_artifacts_lie_where_they_should(failed: FailedRun) -> None:
    run = failed.read()
    inputs = {entry.dataset.name: entry.dataset for entry in run.inputs.dataset_inputs}
    assert inputs["sst2"].digest == "d" * 36
    assert json.loads(inputs["sst2"].profile) == {"train": 67, "validation": 87}
    assert run.info.artifact_uri.startswith(failed.root.as_uri())
    assert {file.path for file in failed.client.list_artifacts(failed.run_id)} == {"recipe.yaml"}


def test_track_copies_a_run_once(failed: FailedRun, tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/copy/mlflow.db"
    first, second = (track(str(failed.folder), "mlflow", uri)[0] for _ in range(2))
    assert first.startswith("mlflow: sent 55 values: ")
    assert second.startswith("mlflow: sent 0 values: ")
    copied = MlflowClient(tracking_uri=uri)
    experiment = copied.get_experiment_by_name("team / demo")
    (there,) = copied.search_runs([experiment.experiment_id])
    assert there.info.status == "FAILED"
    assert history(copied, there.info.run_id, "train/loss") == [(step, 1 / step) for step in range(1, 6)]
    assert there.data.params["training.steps"] == "100"


def test_track_sends_nothing_to_the_mlflow_that_has_the_run(failed: FailedRun) -> None:
    (line,) = track(str(failed.folder))
    assert line.startswith(f"mlflow: sent 0 values: {failed.run_id} in ")
    assert failed.read().info.status == "FAILED"


def test_track_reports_what_is_wrong(failed: FailedRun, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="four slashes"):
        track(str(failed.folder), "mlflow", "sqlite:///mlflow.db")
    with pytest.raises(ConfigError, match=r"no tracker 'mlfow'.*Did you mean 'mlflow'"):
        track(str(failed.folder), "mlfow")
    with pytest.raises(RunFolderError, match="holds no metrics"):
        track(str(tmp_path / "none"))


def test_a_resumed_run_continues_the_same_mlflow_run(tmp_path: Path) -> None:
    before = FailedRun(tmp_path)
    bundle = before.folder / "bundles" / "sst2"
    bundle.mkdir(parents=True)
    (bundle / "adapter_config.json").write_text("{}")
    # From step 3, with one setting changed; points 4 and 5 come a second time.
    recipe = dict(make_facts(before.folder).recipe) | {"training": {"steps": 200}, "seed": 7}
    resumed = Recorded(before.folder, before.settings, key="another key", tags=TAGS)
    resumed.start(start_step=3, tracking_state=before.state, recipe=recipe)
    resumed.step(4, 5, 6)
    resumed.call("on_evaluation", make_evaluation(5))
    while before.read().info.status != "RUNNING":
        time.sleep(0.05)
    remote = open_place(f"memory://{uuid4().hex}/bundles/trec")
    remote.fs.pipe_file(remote.child("adapter_config.json").path, b"far")
    resumed.end(RunOutcome("finished", 6, 3.0, bundles={"sst2": str(bundle), "trec": str(remote)}))
    assert run_id_of(resumed) == before.run_id
    run, client = before.read(), before.client
    assert run.info.status == "FINISHED"
    assert (run.data.params["training.steps"], run.data.params["seed"]) == ("100", "7")
    assert "training.steps=200" in run.data.tags["hyperscale.changed_at_step_3"]
    assert {step for step, _ in history(client, run.info.run_id, "train/loss")} == set(range(1, 7))
    for task, content in (("sst2", "{}"), ("trec", "far")):
        file = f"bundles/{task}/adapter_config.json"
        assert [artifact.path for artifact in client.list_artifacts(run.info.run_id, f"bundles/{task}")] == [file]
        assert Path(client.download_artifacts(run.info.run_id, file, str(tmp_path))).read_text() == content
    assert len(client.search_runs([run.info.experiment_id])) == 1


def test_a_bundle_that_was_exported_again_replaces_the_one_in_mlflow(tmp_path: Path) -> None:
    folder, bundle = tmp_path / "run", tmp_path / "run" / "bundles" / "sst2"
    bundle.mkdir(parents=True)
    state: dict[str, Any] = {}
    for steps, digest in ((1, "first"), (2, "second"), (3, "second")):
        (bundle / "hyperscale.json").write_text(json.dumps({"files": {"weights.bin": digest}}))
        (bundle / "weights.bin").write_text(digest if steps < 3 else "an unchanged manifest vouches for these")
        recorded = Recorded(folder, {"mlflow": {}})
        recorded.start(start_step=steps - 1, tracking_state=state)
        recorded.step(steps)
        recorded.end(RunOutcome("finished", steps, 1.0, bundles={"sst2": str(bundle)}))
        state = recorded.state()
        client, run_id = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db"), run_id_of(recorded)
        file = client.download_artifacts(run_id, "bundles/sst2/weights.bin", str(tmp_path))
        assert Path(file).read_text() == digest


def test_the_next_process_sends_what_a_killed_one_did_not(tmp_path: Path) -> None:
    folder, settings = tmp_path / "run", {"mlflow": {"artifacts": False}}
    opened = Recorded(folder, settings)
    opened.start()
    opened.step(1)
    opened.end(RunOutcome("failed", 1, 1.0))
    # Steps 2 to 5 are in the file alone, as after a kill between the two; the run goes on from step 4.
    journal = Recorded(folder, {})
    journal.start(start_step=1, tracking_state=opened.state())
    journal.step(2, 3, 4)
    journal.call("on_evaluation", make_evaluation(4))
    journal.step(5)
    journal.end(RunOutcome("failed", 5, 1.0))

    resumed = Recorded(folder, settings)
    resumed.start(start_step=4, tracking_state=opened.state())
    resumed.step(6)
    resumed.end(RunOutcome("finished", 6, 1.0))
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    # Once each, and nothing past the step that the run goes on from: it makes that anew.
    assert history(client, run_id_of(resumed), "train/loss") == [(step, 1 / step) for step in (1, 2, 3, 4, 6)]
    assert history(client, run_id_of(resumed), "eval/sst2/accuracy") == [(4, 80.0)]


def test_a_run_restarted_before_its_first_checkpoint_stays_one_run(tmp_path: Path) -> None:
    folder, settings = tmp_path / "run", {"mlflow": {"artifacts": False}}
    first, second = Recorded(folder, settings), Recorded(folder, settings)
    first.start()
    second.start()
    assert run_id_of(first) == run_id_of(second)
    for run in (second, first):
        run.end(RunOutcome("finished", 0, 1.0))
    client, tracking = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db"), TrackingSettings.model_validate(settings)
    known = run_id_of(second)
    client.update_run(known, status="RUNNING")  # as a kill leaves it
    record_end(tracking, str(tmp_path), "key", RunOutcome("stopped", 3, 1.0, message="by its user"))
    assert client.get_run(known).info.status == "KILLED"
    record_end(tracking, str(tmp_path), "another key", RunOutcome("failed", 3, 1.0))

    # Deleted in the UI between two starts: the run goes on under a new one.
    client.delete_run(known)
    third = Recorded(folder, settings)
    third.start(tracking_state=second.state())
    third.end(RunOutcome("finished", 0, 1.0))
    assert run_id_of(third) != known
    assert len(client.search_runs([str(third.state()["mlflow"]["experiment_id"])])) == 1


def test_a_deleted_experiment_is_one_clear_error(tmp_path: Path) -> None:
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    client.delete_experiment(client.create_experiment("gone"))
    run = Recorded(tmp_path / "run", {"mlflow": {"experiment": "gone"}})
    with pytest.raises(ConfigError, match="'gone' was deleted"):
        run.start()
    run.end(RunOutcome("failed", 0, 0.0))


def test_an_unusable_server_or_database_is_one_clear_error_without_its_password(tmp_path: Path) -> None:
    (tmp_path / "damaged.db").write_text("this is no database, " * 100)
    nobody = f"http://someone:hunt/er@2@127.0.0.1:{free_port()}"
    for uri in (nobody, f"sqlite:///{tmp_path}/damaged.db", "postgresql+nodriver://a:hunt/er@2@db/mlflow"):
        run = Recorded(tmp_path / "run", {"mlflow": {"uri": uri}})
        with pytest.raises(ConfigError, match=r"tracking.mlflow: .* cannot be used.*enabled=false") as caught:
            run.start()
        run.end(RunOutcome("failed", 0, 0.0))
        assert "\n" not in str(caught.value)
        assert "er@2" not in str(caught.value)
        assert caught.value.__suppress_context__


def wait_for(condition: Any, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_a_killed_server_holds_up_no_step_and_gets_everything_when_it_is_back(tmp_path: Path) -> None:
    port = free_port()
    settings = {"mlflow": {"uri": f"http://127.0.0.1:{port}"}}
    run = Recorded(tmp_path / "run", settings)
    with mlflow_server(tmp_path, port) as server:
        run.start()
        run.step(*range(1, 21))
        kill_group(server)
        started = time.monotonic()
        run.step(*range(21, 101))
        assert time.monotonic() - started < 30  # each of 80 calls would wait 5 s for the server
    with mlflow_server(tmp_path, port) as server:
        client = MlflowClient(tracking_uri=f"http://127.0.0.1:{port}")
        run_id = run_id_of(run)
        wait_for(lambda: len(client.get_metric_history(run_id, "train/loss")) >= 100)
        assert history(client, run_id, "train/loss") == [(step, 1 / step) for step in range(1, 101)]

        # This time it does not die but answers nothing any more, like a host behind a broken network.
        os.killpg(server.pid, signal.SIGSTOP)
        run.step(*range(101, 121))
        started = time.monotonic()
        run.end(RunOutcome("finished", 120, 9.0))
        assert time.monotonic() - started < 100  # the limit of a tracker that answers is 300 s

        # A resume starts meanwhile; `track` brings what was lost.
        resumed = Recorded(tmp_path / "run", settings)
        resumed.start(start_step=100, tracking_state=run.state())
        resumed.step(*range(101, 121))
        os.killpg(server.pid, signal.SIGCONT)
        resumed.end(RunOutcome("finished", 120, 1.0))
        track(str(tmp_path / "run"))
        assert run_id_of(resumed) == run_id
        assert [step for step, _ in history(client, run_id, "train/loss")] == list(range(1, 121))
        assert client.get_run(run_id).info.status == "FINISHED"


def test_no_secret_reaches_a_run_folder_or_a_server(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    port, folder = free_port(), tmp_path / "run"
    uri = f"http://someone:hunt%2Fer2@127.0.0.1:{port}"
    run = Recorded(folder, {"mlflow": {"uri": uri}})
    place = tmp_path / "server"
    place.mkdir()
    with mlflow_server(place, port):
        run.start()
        run.step(1, 2)
        run.end(RunOutcome("failed", 2, 1.0, message=f"no answer from {uri}/api"))
        # The records have lost the password: the environment or --uri brings it.
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
        with pytest.raises(ConfigError, match=r"hold no passwords.*MLFLOW_TRACKING_URI.*--uri"):
            track(str(folder))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        lines = track(str(folder)) + track(str(folder), "mlflow", uri)
        assert [line.startswith("mlflow: sent 0 values: http") for line in lines] == [True, True]
    printed = "".join(capfd.readouterr()) + "".join(lines) + json.dumps(run.state())
    assert "er2@" not in printed
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"metrics.jsonl", "server.db", "recipe.yaml", "server.log"} <= {path.name for path in files}
    assert [path for path in files if b"hunt%2Fer2" in path.read_bytes()] == []
