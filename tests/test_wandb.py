"""A run in Weights & Biases' offline mode, read back from the files that `wandb sync` would upload."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from wandb.proto import wandb_internal_pb2
from wandb.sdk.internal.datastore import DataStore

from hyperscale.config.tracking import TrackingSettings
from hyperscale.run.context import RunIdentity, WorkerContext, ignore
from hyperscale.run.worker import train_worker
from hyperscale.tracking.trackers import record_end, track
from hyperscale.training.callbacks import RunOutcome
from tests.runs import make_recipe, write_tasks
from tests.tracked import Recorded, make_evaluation, make_facts

OFFLINE = {"wandb": {"enabled": True, "mode": "offline"}}
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:wandb")


@pytest.fixture(autouse=True)
def no_settings_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)


def read_records(folder: Path) -> list[list[Any]]:
    """Return the records of every offline run below a folder, the oldest first.

    W&B's own process writes the files and may still be at work when `finish` returns: this waits for their last record.
    """
    deadline = time.monotonic() + 60
    while True:
        runs = scan(folder)
        if runs and all(records and records[-1].HasField("exit") for records in runs):
            return runs
        assert time.monotonic() < deadline
        time.sleep(0.1)


def scan(folder: Path) -> list[list[Any]]:
    runs = []
    for file in sorted(folder.rglob("*.wandb"), key=lambda file: file.stat().st_ctime_ns):
        store, records = DataStore(), []
        store.open_for_scan(str(file))
        while (data := store.scan_data()) is not None:
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            records.append(record)
        store.close()
        runs.append(records)
    return runs


def history(records: list[Any], key: str) -> list[tuple[int, float]]:
    rows = []
    for record in records:
        items = {"/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        if key in items:
            rows.append((items["_step"], items[key]))
    return rows


def config(records: list[Any]) -> dict[str, Any]:
    (run,) = (record.run for record in records if record.HasField("run"))
    return {update.key: json.loads(update.value_json) for update in run.config.update}


def summary(records: list[Any], key: str) -> Any:
    updates = [update for record in records for update in record.summary.update if update.key == key]
    return json.loads(updates[-1].value_json) if updates else None


def test_a_run_and_its_resume_lie_in_offline_files_of_one_run(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run = Recorded(folder, OFFLINE, tags={"git_commit": "f" * 40})
    run.start(recipe=make_facts(folder).recipe | {"tracking": {"uri": "http://a:hunter2@host"} | OFFLINE})
    run.step(1, 2, 3, 4)
    run.call("on_evaluation", make_evaluation(4))
    state = run.state()
    run.end(RunOutcome("failed", 4, 1.0, message="no answer from http://a:hunter2@host"))
    resumed = Recorded(folder, OFFLINE)
    resumed.start(start_step=3, tracking_state=state)
    resumed.step(4, 5)
    resumed.end(RunOutcome("finished", 5, 1.0))

    before, after = read_records(tmp_path)
    assert history(before, "train/loss") == [(step, 1 / step) for step in (1, 2, 3, 4)]
    assert history(before, "eval/mean") == [(4, 70.0)]
    assert config(before)["training"]["steps"] == 100
    assert config(before)["tags"] == {"git_commit": "f" * 40}
    assert (summary(before, "hyperscale.status"), summary(after, "hyperscale.status")) == ("failed", "finished")
    assert history(after, "train/loss")[-1] == (5, 0.2)
    assert {step for step, _ in history(after, "train/loss")} <= {4, 5}  # 1 to 3 were sent before
    assert resumed.state()["wandb"]["run_id"] == state["wandb"]["run_id"]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path for path in files if b"hunter2" in path.read_bytes()] == []


def test_track_sends_a_run_to_wandb_once(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run = Recorded(folder, {})
    run.start(recipe={"tracking": {"wandb": {"mode": "offline"}, "mlflow": {"enabled": False}}})
    run.step(1, 2)
    run.end(RunOutcome("finished", 2, 1.0))
    first, second = track(str(folder), "wandb"), track(str(folder), "wandb")
    assert first[0].startswith("wandb: sent 19 values: ")
    assert second[0].startswith("wandb: sent 0 values: ")
    assert history(read_records(tmp_path)[0], "train/loss") == [(1, 1.0), (2, 0.5)]


def test_the_driver_records_that_a_run_was_killed(tmp_path: Path) -> None:
    tracking = TrackingSettings.model_validate({"mlflow": {"enabled": False}} | OFFLINE)
    record_end(tracking, str(tmp_path), "key", RunOutcome("failed", 7, 1.0, message="killed"))
    (records,) = read_records(tmp_path)
    assert (summary(records, "hyperscale.status"), summary(records, "hyperscale.message")) == ("failed", "killed")


def test_a_trained_run_is_recorded_with_the_other_trackers_off(tiny_t5_folder: Path, tmp_path: Path) -> None:
    tasks = write_tasks(tmp_path / "tasks")
    tracking = {"mlflow": {"enabled": False}, "progress": {"enabled": False}} | OFFLINE
    recipe = make_recipe(tiny_t5_folder, tasks, tmp_path / "runs" / "small", tracking=tracking)
    context = WorkerContext(0, 1, 0, "local", ignore, RunIdentity.new(recipe.name))
    result = train_worker(recipe, context)
    assert result is not None
    assert set(result.trackers) == {"wandb"}
    (records,) = read_records(Path(recipe.output).parent)
    assert [step for step, _ in history(records, "train/loss")] == list(range(1, recipe.training.steps + 1))
    assert config(records)["name"] == recipe.name
    assert summary(records, "hyperscale.status") == "finished"
    assert result.trackers["wandb"]["command"].startswith("wandb sync ")
