"""What every tracker needs: settings, parameters, provenance, the JSONL mirror and the outbox."""

import math
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from uuid import uuid4

import fsspec
import pytest
from pydantic import ValidationError

from hyperscale.config.tracking import MlflowSettings, TrackingSettings
from hyperscale.errors import ConfigError, RunFolderError
from hyperscale.tracking.jsonl import JsonlTracker, read_entries
from hyperscale.tracking.mlflow import tracking_uri
from hyperscale.tracking.outbox import Outbox
from hyperscale.tracking.params import flatten
from hyperscale.tracking.provenance import git_commit, package_versions
from hyperscale.training.callbacks import CheckpointRecord, RunOutcome, StepRecord
from tests.tracked import SECRET, make_evaluation, make_facts, make_step, read_lines

pytestmark = pytest.mark.usefixtures("nothing_is_left_behind")


def test_settings_refuse_uris_that_mean_something_else_on_another_machine() -> None:
    assert TrackingSettings().mlflow.uri is None
    for uri in ("http://host:5000", "sqlite:////data/mlflow.db", SECRET):
        assert MlflowSettings(uri=uri).uri == uri
    for uri, words in (("./mlruns", "no longer keeps runs in folders"), ("sqlite:///mlflow.db", "four slashes")):
        with pytest.raises(ValidationError, match=words):
            MlflowSettings(uri=uri)
    assert tracking_uri(MlflowSettings(), "/data/runs/") == "sqlite:////data/runs/mlflow.db"
    with pytest.raises(ConfigError, match=r"tracking.mlflow.uri"):
        tracking_uri(MlflowSettings(), "s3://bucket/runs")


def test_parameters_are_flat() -> None:
    flat = flatten({"a": {"b": [1, 2], "c": None, "d": {}}, "list": [{"x": True}, {"x": "y"}]})
    assert flat == {"a.b": "[1, 2]", "a.c": "null", "a.d": "{}", "list.0.x": "true", "list.1.x": "y"}


def test_provenance_tells_the_commit_and_the_versions(tmp_path: Path) -> None:
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


def test_jsonl_faults_are_told_at_the_start_and_never_raised_later(tmp_path: Path) -> None:
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


def test_outbox_keeps_order_retries_what_passes_and_drops_what_never_will() -> None:
    got: list[int] = []
    faults = [ConnectionError("away"), ConnectionError("away")]

    def deliver(items: list[int]) -> None:
        if faults:
            raise faults.pop()
        if 13 in items:
            raise ValueError("never")
        got.extend(items)

    box: Outbox[int] = Outbox(deliver, lambda error: isinstance(error, ConnectionError), "test", batch=5)
    box.put([1, 2, 3])
    box.call(lambda: got.append(-1))
    box.put([4])
    while -1 not in got:
        time.sleep(0.01)
    box.put([13])
    box.call(lambda: got.append(-2))
    assert box.close(patience=5, limit=5) == 1
    assert got == [1, 2, 3, -1, 4, -2]

    def never(items: list[int]) -> None:
        raise ConnectionError(f"{len(items)} items")

    away: Outbox[int] = Outbox(never, bool, "nobody", capacity=10)
    away.put(range(25))
    started = time.monotonic()
    assert away.close(patience=0.3, limit=60) == 25
    assert time.monotonic() - started < 2
