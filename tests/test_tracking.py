"""What every tracker needs: settings, parameters, provenance, the file of the run and the pusher."""

import json
import math
import os
import re
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from uuid import uuid4

import fsspec
import pytest
from pydantic import ValidationError

import hyperscale
from hyperscale.config.plugins import import_object
from hyperscale.config.secrets import without_credentials
from hyperscale.config.tracking import TRACKER_SETTINGS, MlflowSettings, TrackingSettings
from hyperscale.errors import ConfigError, RunFolderError
from hyperscale.run.context import read_result
from hyperscale.run.session import LastStep, notifying_listeners
from hyperscale.tracking.jsonl import Entry, JsonlTracker, read_entries
from hyperscale.tracking.mlflow import tracking_uri
from hyperscale.tracking.params import flatten
from hyperscale.tracking.provenance import git_commit, package_versions
from hyperscale.tracking.pusher import Pusher
from hyperscale.tracking.trackers import TRACKERS
from hyperscale.training.callbacks import CheckpointRecord, RunFacts, RunOutcome, StepRecord
from tests.tracked import SECRET, Recorded, make_evaluation, make_facts, make_step, read_lines

RESULTS_OF_OLD_RUNS = {"run/context.py"}  # reads the `mlflow` key of a result.json of an earlier version
pytestmark = pytest.mark.usefixtures("nothing_is_left_behind")


def test_a_tracking_uri_of_one_machine_is_an_error() -> None:
    assert TrackingSettings().mlflow.uri is None
    for uri in ("http://host:5000", "sqlite:////data/mlflow.db", SECRET):
        assert MlflowSettings(uri=uri).uri == uri
    for uri, words in (("./mlruns", "no longer keeps runs in folders"), ("sqlite:///mlflow.db", "four slashes")):
        with pytest.raises(ValidationError, match=words):
            MlflowSettings(uri=uri)
    assert tracking_uri(MlflowSettings(), "/data/runs/") == "sqlite:////data/runs/mlflow.db"
    with pytest.raises(ConfigError, match=r"tracking.mlflow.uri"):
        tracking_uri(MlflowSettings(), "s3://bucket/runs")


def test_a_uri_takes_its_password_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = MlflowSettings(uri="postgresql://me:${TRACKING_WORD}@db/mlflow")
    monkeypatch.delenv("TRACKING_WORD", raising=False)
    with pytest.raises(ConfigError, match="variable TRACKING_WORD is not set"):
        tracking_uri(settings, "/runs")
    monkeypatch.setenv("TRACKING_WORD", "hunter2")
    assert tracking_uri(settings, "/runs") == "postgresql://me:hunter2@db/mlflow"


def test_a_uri_of_a_run_folder_gets_its_password_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run folders hold `***`: `track` after an outage, or a resumed run, could not log in with it."""
    whole = "postgresql://me:p@ss/w0rd@db/mlflow"
    masked = MlflowSettings(uri=without_credentials(whole))
    assert masked.uri == "postgresql://***@db/mlflow"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", whole)
    assert tracking_uri(masked, "/runs") == "postgresql://me:p%40ss%2Fw0rd@db/mlflow"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:p@ss/w0rd@other/mlflow")
    with pytest.raises(ConfigError, match=r"run folders hold no passwords, so postgresql://\*\*\*@db/mlflow lacks its"):
        tracking_uri(masked, "/runs")


def test_parameters_are_flat() -> None:
    flat = flatten({"a": {"b": [1, 2], "c": None, "d": {}}, "list": [{"x": True}, {"x": "y"}]})
    assert flat == {"a.b": "[1, 2]", "a.c": "null", "a.d": "{}", "list.0.x": "true", "list.1.x": "y"}


def test_provenance_holds_the_commit_and_the_versions(tmp_path: Path) -> None:
    assert package_versions()["torch"]
    assert git_commit(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run([*git, *command], check=True)
    commit = git_commit(tmp_path)
    assert commit is not None
    assert len(commit) == 40
    (tmp_path / "file").write_text("")
    subprocess.run([*git, "add", "file"], check=True)
    assert git_commit(tmp_path) == f"{commit}-dirty"


def test_jsonl_has_every_step_once_after_a_resume(tmp_path: Path) -> None:
    tracker = JsonlTracker(str(tmp_path), "key-1")
    tracker.on_run_start(make_facts(tmp_path))
    tracker.on_evaluation(make_evaluation(0, "untouched"))
    for step in range(1, 8):
        tracker.on_step(make_step(step))
        assert read_lines(tmp_path)[-1]["step"] == step  # flushed
        if step == 5:
            tracker.on_checkpoint(CheckpointRecord(5, "checkpoints/step-000005"))
    state = tracker.state()
    tracker.on_run_end(RunOutcome("failed", 7, 1.0))
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"event": "step", "ti')  # killed while writing

    resumed = JsonlTracker(str(tmp_path), "key-2")
    resumed.on_run_start(make_facts(tmp_path, start_step=5, tracking_state=state))
    for step in range(6, 11):
        resumed.on_step(make_step(step))
    resumed.on_run_end(RunOutcome("finished", 10, 2.0, bundles={"sst2": "bundles/sst2"}))

    lines = read_lines(tmp_path)
    assert [line["step"] for line in lines if line["event"] == "step"] == list(range(1, 11))
    assert [line["run_key"] for line in lines if line["event"] == "run_start"] == ["key-1", "key-1"]
    assert [line["event"] for line in lines].count("run_end") == 1
    assert "hunter2" not in (tmp_path / "metrics.jsonl").read_text()
    entries = [entry.record for entry in read_entries(str(tmp_path))]
    assert len(entries) == len(lines)
    steps = [record for record in entries if isinstance(record, StepRecord)]
    assert math.isnan(steps[2].grad_norm)
    assert steps[6] == make_step(7)
    assert entries[1] == make_evaluation(0, "untouched")
    assert entries[-1] == RunOutcome("finished", 10, 2.0, bundles={"sst2": "bundles/sst2"})

    # A run that starts at step 0 again begins anew: it died before its first checkpoint.
    again = JsonlTracker(str(tmp_path), "key-3")
    again.on_run_start(make_facts(tmp_path))
    again.on_run_end(RunOutcome("stopped", 0, 0.0))
    assert [line["event"] for line in read_lines(tmp_path)] == ["run_start", "run_end"]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_jsonl_on_an_object_store_arrives_with_every_checkpoint() -> None:
    folder = f"memory://{uuid4().hex}/run"
    first = JsonlTracker(folder, "key")
    first.on_run_start(make_facts(folder))
    first.on_step(make_step(1))
    first.on_checkpoint(CheckpointRecord(1, "x"))
    first.on_step(make_step(2))
    assert [entry.step for entry in read_entries(folder)] == [0, 1, 1]
    second = JsonlTracker(folder, "key")
    second.on_run_start(make_facts(folder, start_step=1))
    second.on_step(make_step(2))
    second.on_run_end(RunOutcome("finished", 2, 1.0))
    assert [entry.step for entry in read_entries(folder)] == [0, 1, 1, 1, 2, 2]
    fsspec.filesystem("memory").rm(folder, recursive=True)
    first.on_run_end(RunOutcome("failed", 2, 1.0))


def test_jsonl_faults_are_raised_only_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="cannot be written"):
        JsonlTracker(str(tmp_path / "file"), "key").on_run_start(make_facts(tmp_path))
    # A disk that is full for a while, in a process of its own: the limit is the whole process's.
    script = textwrap.dedent(
        """
        import resource, sys
        from hyperscale.tracking.jsonl import JsonlTracker
        from hyperscale.training.callbacks import RunOutcome
        from tests.tracked import make_facts, make_step
        tracker = JsonlTracker(sys.argv[1], "key")
        tracker.on_run_start(make_facts(sys.argv[1]))
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, hard))
        for step in range(1, 51):
            tracker.on_step(make_step(step))
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        tracker.on_step(make_step(51))
        tracker.on_run_end(RunOutcome("finished", 51, 1.0))
        """
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", script, str(tmp_path / "run")]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr.count("cannot be written") == 1
    steps = [entry.step for entry in read_entries(str(tmp_path / "run"))]
    assert steps[-2:] == [51, 51]
    assert steps[:6] == [0, 1, 2, 3, 4, 5]
    assert len(steps) < 45


class Place:
    """A tracker in memory that can be away, and that refuses step 13."""

    def __init__(self) -> None:
        self.got: list[int] = []
        self.faults = 0
        self.is_away = False

    def open(self, facts: RunFacts, run_key: str, live: bool) -> None: ...

    def push(self, entries: Sequence[Entry], may_be_there: bool) -> int:
        if self.is_away or self.faults > 0:
            self.faults -= 1
            raise ConnectionError("http://me:hunter2@host is away")
        steps = [entry.step for entry in entries if isinstance(entry.record, StepRecord)]
        if 13 in steps:
            raise ValueError("never")
        self.got += steps
        return len(steps)

    def is_temporary(self, error: Exception) -> bool:
        return isinstance(error, ConnectionError)

    def state(self) -> dict[str, str]:
        return {"where": "memory"}

    def close(self) -> None: ...

    def record_end(self, run_key: str, outcome: RunOutcome) -> None: ...

    def record_comparison(self, name: str, metrics: object, files: object) -> None: ...


def push_steps(folder: Path, place: Place, steps: int, patience: float) -> float:
    """Record a run and return how long its end took."""
    journal = JsonlTracker(str(folder), "key")
    pusher = Pusher("memory", place, journal, patience)
    for listener in (journal, pusher):
        listener.on_run_start(make_facts(folder))
    for step in range(1, steps + 1):
        for listener in (journal, pusher):
            listener.on_step(make_step(step))
    started = time.monotonic()
    for listener in (journal, pusher):
        listener.on_run_end(RunOutcome("finished", steps, 1.0))
    return time.monotonic() - started


def test_a_pusher_keeps_the_order_retries_temporary_errors_and_skips_rejected_records(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = Place()
    place.faults = 2
    push_steps(tmp_path, place, 500, patience=60)
    assert place.got == [step for step in range(1, 501) if step != 13]
    assert caplog.text.count("memory rejected a record: never") == 1
    assert caplog.text.count("does not answer") == 1
    assert "hunter2" not in caplog.text
    assert f"hyperscale track {tmp_path} --to memory" in caplog.text


def test_a_pusher_does_not_wait_for_an_unreachable_server(tmp_path: Path) -> None:
    place = Place()
    place.is_away = True
    assert push_steps(tmp_path, place, 5, patience=0.3) < 30  # the limit of a place that answers is 300 s
    assert place.got == []
    assert len(read_lines(tmp_path)) == 7


def test_listeners_that_started_learn_how_the_run_ended() -> None:
    class Listener(LastStep):
        def __init__(self, fails: bool = False) -> None:
            super().__init__(0)
            self.fails, self.ends = fails, list[RunOutcome]()

        def on_run_start(self, facts: RunFacts) -> None:
            if self.fails:
                raise ConfigError("no answer from http://me:hunter2@host")

        def on_run_end(self, outcome: RunOutcome) -> None:
            self.ends.append(outcome)

    class Run:
        last_step = 95

        def __init__(self, *callbacks: Listener) -> None:
            self.callbacks = callbacks

        def facts(self) -> None: ...

    first, broken, third = Listener(), Listener(fails=True), Listener()
    with pytest.raises(ConfigError), notifying_listeners(Run(first, broken, third)):
        raise AssertionError("the run must not start")
    ((one,), (two,)) = first.ends, broken.ends
    assert one == two
    assert (one.status, one.step, one.message) == ("failed", 95, "no answer from http://***@host")
    assert third.ends == []


def test_nothing_outside_its_own_files_names_a_tracker() -> None:
    package = Path(hyperscale.__file__).parent
    allowed = {"config/tracking.py", *(f"tracking/{path.name}" for path in (package / "tracking").glob("*.py"))}
    named = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if re.search("mlflow|wandb|weights & biases", path.read_text(encoding="utf-8"), re.IGNORECASE)
    }
    assert named - allowed == RESULTS_OF_OLD_RUNS


def test_a_result_from_before_the_table_of_trackers_is_read(tmp_path: Path) -> None:
    old = {"name": "a", "folder": str(tmp_path), "steps": 1, "seconds": 1.0, "evaluations": []}
    flat = {"mlflow_uri": "sqlite:////runs/mlflow.db", "mlflow_experiment_id": "1", "mlflow_run_id": "abc"}
    (tmp_path / "result.json").write_text(json.dumps(old | {"mlflow": flat}))
    place = read_result(str(tmp_path)).trackers["mlflow"]
    assert (place["run_id"], place["title"]) == ("abc", "MLflow")


def test_a_tracker_of_another_package_has_its_own_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for registry in (TRACKERS, TRACKER_SETTINGS):
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "plugin_package"))
    register_csv = import_object("hyperscale_example.register:trackers")
    register_csv()
    file = tmp_path / "steps.csv"
    run = Recorded(tmp_path / "run", {"csv": {"enabled": True, "file": str(file)}})
    run.start()
    run.step(1, 2)
    assert run.state()["csv"]["where"] == str(file)
    run.end(RunOutcome("finished", 2, 1.0))
    assert file.read_text() == "step,loss\n1,1.0\n2,0.5\n"
    with pytest.raises(ValidationError, match=r"csv.fil: Extra inputs"):
        TrackingSettings.model_validate({"csv": {"file": "x", "fil": "x"}})
    with pytest.raises(ValidationError, match="unknown key 'mlfow'; allowed: mlflow, wandb, progress, csv"):
        TrackingSettings.model_validate({"mlfow": {}})
    dumped = TrackingSettings.model_validate({"csv": {"file": "x"}}).model_dump(mode="json")
    assert dumped["csv"] == {"enabled": False, "file": "x"}
    assert TrackingSettings.model_validate(dumped).model_dump(mode="json") == dumped
