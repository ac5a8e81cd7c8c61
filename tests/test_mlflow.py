"""MLflow on SQLite, and an MLflow server that is killed in the middle of a run."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from mlflow import MlflowClient

from hyperscale.config.tracking import MlflowSettings
from hyperscale.errors import ConfigError, RunFolderError
from hyperscale.tracking.jsonl import JsonlTracker
from hyperscale.tracking.mlflow import MlflowTracker, record_end
from hyperscale.tracking.sync import sync_run, sync_to_mlflow
from hyperscale.training.callbacks import CheckpointRecord, RunOutcome
from tests.tracked import make_evaluation, make_facts, make_step

# MLflow 3.17 under SQLAlchemy 2.1.
pytestmark = [
    pytest.mark.usefixtures("nothing_is_left_behind"),
    pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning"),
]


def history(client: MlflowClient, run_id: str, key: str) -> list[tuple[int, float]]:
    return sorted((metric.step, metric.value) for metric in client.get_metric_history(run_id, key))


def test_a_whole_run_in_mlflow_on_sqlite_and_its_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, folder, elsewhere = tmp_path / "runs", tmp_path / "runs" / "demo", tmp_path / "elsewhere"
    for place in (folder, elsewhere):
        place.mkdir(parents=True)
    monkeypatch.chdir(elsewhere)
    bundle = folder / "bundles" / "sst2"
    bundle.mkdir(parents=True)
    (bundle / "adapter_config.json").write_text("{}")
    settings = MlflowSettings(experiment="team / demo", tags={"owner": "me"}, log_system_metrics=True)
    tags = {"mlflow.source.git.commit": "f" * 40, "version.torch": "2.13"}

    tracker, mirror = MlflowTracker(settings, str(root), "key", tags), JsonlTracker(str(folder), "key")
    for callback in (mirror, tracker):
        callback.on_run_start(make_facts(folder))
        callback.on_evaluation(make_evaluation(0, "majority", 50.0))
        callback.on_evaluation(make_evaluation(0, "untouched", 40.0))
        for step in range(1, 6):
            callback.on_step(make_step(step))
        callback.on_evaluation(make_evaluation(5))
        callback.on_checkpoint(CheckpointRecord(5, "checkpoints/step-000005"))
    state = dict(mirror.state()) | dict(tracker.state())
    for callback in (mirror, tracker):
        callback.on_run_end(RunOutcome("failed", 5, 3.0, message="worker killed"))

    client = MlflowClient(tracking_uri=f"sqlite:///{root}/mlflow.db")
    run = client.get_run(state["mlflow_run_id"])
    assert run.info.status == "FAILED"
    assert run.info.run_name == "demo"
    assert run.data.params["training.steps"] == "100"
    assert run.data.params["adaptation.adapters.0.kind"] == "lora"
    assert len(run.data.params["training.note"]) == 6000
    assert "hunter2" not in str(run.data.params)
    assert run.data.tags["mlflow.source.git.commit"] == "f" * 40
    assert run.data.tags["owner"] == "me"
    assert run.data.tags["hyperscale.message"] == "worker killed"
    assert run.data.tags["hyperscale.checkpoint"] == "checkpoints/step-000005"
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
    assert {key: run.data.metrics[key] for key in expected} == pytest.approx(expected)
    inputs = {entry.dataset.name: entry.dataset for entry in run.inputs.dataset_inputs}
    assert inputs["sst2"].digest == "d" * 36
    assert json.loads(inputs["sst2"].profile) == {"train": 67, "validation": 87}
    assert run.info.artifact_uri.startswith(root.as_uri())
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {"recipe.yaml"}

    # The same run goes on from step 3 with one setting changed; points 4 and 5 come a second time.
    recipe = dict(make_facts(folder).recipe) | {"training": {"steps": 200}, "seed": 7}
    resumed = MlflowTracker(settings, str(root), "another key", tags)
    resumed.on_run_start(make_facts(folder, start_step=3, tracking_state=state, recipe=recipe))
    for step in (4, 5, 6):
        resumed.on_step(make_step(step))
    resumed.on_evaluation(make_evaluation(5))
    while client.get_run(run.info.run_id).info.status != "RUNNING":
        time.sleep(0.05)
    resumed.on_run_end(RunOutcome("finished", 6, 3.0, bundles={"sst2": str(bundle)}))
    assert resumed.state() == state
    run = client.get_run(run.info.run_id)
    assert run.info.status == "FINISHED"
    assert (run.data.params["training.steps"], run.data.params["seed"]) == ("100", "7")
    assert run.data.tags["hyperscale.changed_at_step_3"] == "training.steps=200"
    assert {step for step, _ in history(client, run.info.run_id, "train/loss")} == set(range(1, 7))
    assert [file.path for file in client.list_artifacts(run.info.run_id, "bundles/sst2")] == [
        "bundles/sst2/adapter_config.json"
    ]
    assert len(client.search_runs([run.info.experiment_id])) == 1
    assert list(elsewhere.iterdir()) == []

    # The JSONL, copied to an MLflow that has never seen the run, twice.
    copy = MlflowSettings(uri=f"sqlite:///{tmp_path}/copy/mlflow.db")
    first, second = (sync_to_mlflow(str(folder), copy, str(root)) for _ in range(2))
    assert first.num_sent == 50
    assert first.num_present == 0
    assert (second.num_sent, second.num_present) == (0, first.num_sent)
    assert first.reference == second.reference
    copied = MlflowClient(tracking_uri=copy.uri)
    there = copied.get_run(first.reference.run_id)
    assert there.info.status == "FAILED"
    assert history(copied, there.info.run_id, "train/loss") == [(step, 1 / step) for step in range(1, 6)]
    assert there.data.params["training.steps"] == "100"

    assert sync_run(str(folder), copy.uri).startswith("sent 0 values, 50 were there: ")
    with pytest.raises(ConfigError, match="four slashes"):
        sync_run(str(folder), "sqlite:///mlflow.db")

    # Into the MLflow that has it: nothing to send.
    known = sync_to_mlflow(str(folder), settings, str(root))
    assert (known.num_sent, known.reference.run_id) == (0, run.info.run_id)


def test_what_a_killed_process_had_not_sent_arrives_with_the_next_one(tmp_path: Path) -> None:
    settings, root = MlflowSettings(artifacts=False), str(tmp_path)
    opened, mirror = MlflowTracker(settings, root, "key", {}), JsonlTracker(str(tmp_path), "key")
    for callback in (opened, mirror):
        callback.on_run_start(make_facts(tmp_path))
    opened.on_step(make_step(1))
    opened.on_run_end(RunOutcome("failed", 1, 1.0))
    # Steps 2 to 5 are in the mirror alone, as after a kill between the two; the run goes on from step 4.
    for step in range(1, 5):
        mirror.on_step(make_step(step))
    mirror.on_evaluation(make_evaluation(4))
    mirror.on_step(make_step(5))

    facts = make_facts(tmp_path, start_step=4, tracking_state=opened.state())
    resumed = MlflowTracker(settings, root, "key", {})
    resumed.on_run_start(facts)
    resumed.on_step(make_step(6))
    resumed.on_run_end(RunOutcome("finished", 6, 1.0))
    client = MlflowClient(tracking_uri=f"sqlite:///{root}/mlflow.db")
    run_id = str(resumed.state()["mlflow_run_id"])
    # Once each, and nothing past the step that the run goes on from: it makes that anew.
    assert history(client, run_id, "train/loss") == [(step, 1 / step) for step in (1, 2, 3, 4, 6)]
    assert history(client, run_id, "eval/sst2/accuracy") == [(4, 80.0)]
    mirror.on_run_end(RunOutcome("finished", 6, 1.0))


def test_a_run_restarted_before_its_first_checkpoint_stays_one_run(tmp_path: Path) -> None:
    settings, root = MlflowSettings(artifacts=False), str(tmp_path)
    first = MlflowTracker(settings, root, "key", {})
    first.on_run_start(make_facts(tmp_path))
    second = MlflowTracker(settings, root, "key", {})
    second.on_run_start(make_facts(tmp_path))
    assert first.reference == second.reference
    assert second.reference is not None
    for tracker in (second, first):
        tracker.on_run_end(RunOutcome("finished", 0, 1.0))
    client = MlflowClient(tracking_uri=second.reference.uri)
    client.update_run(second.reference.run_id, status="RUNNING")  # as a kill leaves it
    record_end(settings, root, "key", RunOutcome("stopped", 3, 1.0, message="by its user"))
    assert client.get_run(second.reference.run_id).info.status == "KILLED"
    record_end(settings, root, "another key", RunOutcome("failed", 3, 1.0))

    # Deleted in the UI between two starts: the run goes on under a new one.
    deleted = second.reference.run_id
    client.delete_run(deleted)
    third = MlflowTracker(settings, root, "key", {})
    third.on_run_start(make_facts(tmp_path, tracking_state=second.state()))
    third.on_run_end(RunOutcome("finished", 0, 1.0))
    assert third.state()["mlflow_run_id"] != deleted
    assert len(client.search_runs([second.reference.experiment_id or ""])) == 1


def test_a_deleted_experiment_or_an_absent_server_is_one_clear_error(tmp_path: Path) -> None:
    settings = MlflowSettings(experiment="gone")
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    client.delete_experiment(client.create_experiment("gone"))
    with pytest.raises(ConfigError, match="'gone' was deleted"):
        MlflowTracker(settings, str(tmp_path), "key", {}).on_run_start(make_facts(tmp_path))
    nobody = MlflowSettings(uri=f"http://127.0.0.1:{free_port()}")
    started = time.monotonic()
    with pytest.raises(ConfigError, match=r"tracking.mlflow: http.*enabled=false") as caught:
        MlflowTracker(nobody, str(tmp_path), "key", {}).on_run_start(make_facts(tmp_path))
    assert "\n" not in str(caught.value)
    assert time.monotonic() - started < 15
    (tmp_path / "damaged.db").write_text("this is no database, " * 100)
    for uri in (f"sqlite:///{tmp_path}/damaged.db", "postgresql+nodriver://db/mlflow"):
        with pytest.raises(ConfigError, match=r"tracking.mlflow: .* cannot be used") as caught:
            MlflowTracker(MlflowSettings(uri=uri), str(tmp_path), "key", {}).on_run_start(make_facts(tmp_path))
        assert "\n" not in str(caught.value)
    with pytest.raises(RunFolderError, match="holds no metrics"):
        sync_to_mlflow(str(tmp_path / "none"), nobody, str(tmp_path))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def mlflow_server(folder: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """A real server in a process group of its own; ready when this yields."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/server.db", "--artifacts-destination", str(folder / "art")]
    settings = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with (folder / "server.log").open("ab") as log:
        server = subprocess.Popen(command, env=settings, stdout=log, stderr=log, start_new_session=True, cwd=folder)
    try:
        deadline = time.monotonic() + 180
        while True:
            assert server.poll() is None, (folder / "server.log").read_text()
            assert time.monotonic() < deadline
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1):
                    break
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        yield server
    finally:
        kill_group(server)


def kill_group(server: subprocess.Popen[bytes]) -> None:
    if server.poll() is None:
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def test_a_killed_server_holds_up_no_step_and_gets_everything_when_it_is_back(tmp_path: Path) -> None:
    port = free_port()
    settings = MlflowSettings(uri=f"http://127.0.0.1:{port}")
    tracker, mirror = MlflowTracker(settings, str(tmp_path), "key", {}), JsonlTracker(str(tmp_path / "run"), "key")
    longest = 0.0

    def train(steps: range) -> None:
        nonlocal longest
        for step in steps:
            started = time.monotonic()
            tracker.on_step(make_step(step))
            longest = max(longest, time.monotonic() - started)
            mirror.on_step(make_step(step))
            time.sleep(0.02)

    with mlflow_server(tmp_path, port) as server:
        for callback in (tracker, mirror):
            callback.on_run_start(make_facts(tmp_path / "run"))
        train(range(1, 21))
        kill_group(server)
        train(range(21, 101))
    with mlflow_server(tmp_path, port) as server:
        client = MlflowClient(tracking_uri=settings.uri)
        run_id = tracker.state()["mlflow_run_id"]
        deadline = time.monotonic() + 40
        while len(client.get_metric_history(run_id, "train/loss")) < 100 and time.monotonic() < deadline:
            time.sleep(0.2)
        assert history(client, run_id, "train/loss") == [(step, 1 / step) for step in range(1, 101)]

        # This time it does not die but answers nothing any more, like a host behind a broken network.
        os.killpg(server.pid, signal.SIGSTOP)
        train(range(101, 121))
        outcome = RunOutcome("finished", 120, 9.0)
        started = time.monotonic()
        tracker.on_run_end(outcome)
        waited = time.monotonic() - started
        mirror.on_run_end(outcome)
        assert longest < 0.1
        assert waited < 20

        # A resume starts meanwhile; the JSONL brings what was lost.
        resumed = MlflowTracker(settings, str(tmp_path), "key", {})
        resumed.on_run_start(make_facts(tmp_path / "run", start_step=100, tracking_state=tracker.state()))
        os.killpg(server.pid, signal.SIGCONT)
        report = sync_to_mlflow(str(tmp_path / "run"), settings, str(tmp_path))
        assert report.reference.run_id == run_id
        assert report.num_sent + report.num_present >= 120 * 5
        assert {step for step, _ in history(client, run_id, "train/loss")} == set(range(1, 121))
        resumed.on_run_end(RunOutcome("finished", 120, 1.0))
        assert client.get_run(run_id).info.status == "FINISHED"
    print(f"longest call {longest * 1000:.2f} ms; end of the run without an answer {waited:.1f} s")
