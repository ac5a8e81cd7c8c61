"""A run that was killed and continued ends where an undisturbed one ends."""

import json
import os
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from hyperscale.checkpoint import store
from hyperscale.checkpoint.store import CheckpointStore, find_checkpoint, load_checkpoint
from hyperscale.config.run import Recipe
from hyperscale.data.collate import Batch
from hyperscale.data.loader import TrainLoader
from hyperscale.errors import CheckpointError, RunFolderError
from hyperscale.launch.local import train_in_process
from hyperscale.run.context import RunIdentity, RunResult, WorkerContext, ignore
from hyperscale.run.worker import train_worker
from hyperscale.training.evaluation import VALIDATION, Evaluation, Evaluator
from tests.ranks import Ranks, RanksFailed
from tests.runs import make_recipe, write_tasks

STEPS, SAVED_AT, KILLED_AT = 6, 3, 5


def worker(recipe: Recipe, killed_at: int | None = None) -> RunResult | None:
    """Run the worker on this rank; rank 0 may die as from `kill -9` when so many steps are done."""
    rank = torch.distributed.get_rank()
    if rank == 0 and killed_at is not None:
        die_after(killed_at)
    identity = RunIdentity.of(recipe.name, recipe.output)
    return train_worker(recipe, WorkerContext(rank, recipe.cluster.workers, rank, "torchrun", ignore, identity))


def die_after(steps: int) -> None:
    """Kill this process when it asks for the rows of one more step; nothing outlives it, not even this change."""
    next_step, requests = TrainLoader.next_step, []

    def die_or_go_on(loader: TrainLoader) -> list[Batch]:
        requests.append(None)
        if len(requests) > steps:
            os.kill(os.getpid(), signal.SIGKILL)
        return next_step(loader)

    TrainLoader.next_step = die_or_go_on  # type: ignore[method-assign]


@dataclass(frozen=True)
class Runs:
    """The recipes of an undisturbed run and of one that was killed and went on, and what the latter had left."""

    whole: Recipe
    resumed: Recipe
    killed: Path
    results: tuple[RunResult, RunResult]
    failure: str


@pytest.fixture(scope="module")
def runs(two_ranks: Ranks, tiny_t5_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("runs")
    tasks = write_tasks(folder / "tasks")
    whole, resumed = (
        make_recipe(
            tiny_t5_folder,
            tasks,
            folder / name,  # in one folder: making an MLflow database takes seconds
            backbone={"dropout": 0.1},  # random numbers have to come back too
            training={"steps": STEPS, "checkpoint_every": SAVED_AT, "evaluate_every": 2},
            engine={"kind": "zero"},
            cluster={"workers": 2},
            tracking={"mlflow": {"enabled": True}},
        )
        for name in ("whole", "resumed")
    )
    first, _ = two_ranks.run(worker, whole)
    with pytest.raises(RanksFailed) as failure:
        two_ranks.run(worker, resumed, KILLED_AT)
    killed = Path(shutil.copytree(resumed.output, folder / "killed"))
    second, _ = two_ranks.run(worker, resumed)
    return Runs(whole, resumed, killed, (first, second), str(failure.value))


def lines(folder: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def test_the_killed_run_was_killed(runs: Runs):
    assert "rank 0 died with exit code -9" in runs.failure
    assert [entry["step"] for entry in lines(runs.killed) if entry["event"] == "step"] == [1, 2, 3, 4, 5]
    assert CheckpointStore(str(runs.killed), 2).list() == (f"{runs.killed}/checkpoints/step-000003",)


def test_a_resumed_run_is_bitwise_the_undisturbed_one(runs: Runs):
    whole, resumed = (load_checkpoint(result.checkpoint) for result in runs.results)
    assert whole.step == resumed.step == STEPS
    for part in ("generator", "optimizer"):
        assert whole.tensors[part].keys() == resumed.tensors[part].keys() != set()
        for name, tensor in whole.tensors[part].items():
            assert torch.equal(tensor, resumed.tensors[part][name]), (part, name)
    assert whole.state["loader"] == resumed.state["loader"]
    moved = load_checkpoint(str(runs.killed / "checkpoints/step-000003")).tensors["generator"]
    assert any(not torch.equal(tensor, moved[name]) for name, tensor in whole.tensors["generator"].items())
    scores = [[(entry["stage"], entry["step"], entry["scores"]) for entry in one.evaluations] for one in runs.results]
    assert scores[0] == scores[1]
    for task, bundle in runs.results[0].bundles.items():
        stored = [Path(one.bundles[task], "weights.safetensors").read_bytes() for one in runs.results]
        assert stored[0] == stored[1], bundle


def test_a_resumed_run_is_one_run_to_those_who_listen(runs: Runs):
    steps = {
        recipe.output: [(entry["step"], entry["loss"]) for entry in lines(recipe.output) if entry["event"] == "step"]
        for recipe in (runs.whole, runs.resumed)
    }
    assert steps[runs.resumed.output] == steps[runs.whole.output]
    assert [step for step, _ in steps[runs.whole.output]] == [1, 2, 3, 4, 5, 6]
    starts = [entry for entry in lines(runs.resumed.output) if entry["event"] == "run_start"]
    assert [entry["start_step"] for entry in starts] == [0, SAVED_AT]
    assert len({entry["run_key"] for entry in starts}) == 1
    before = load_checkpoint(str(runs.killed / "checkpoints/step-000003")).state["tracking"]["mlflow"]["run_id"]
    ids = [result.trackers["mlflow"]["run_id"] for result in runs.results]
    assert ids[1] == before != ids[0]


def continued(runs: Runs, folder: Path, **changes: Any) -> Recipe:
    """Return the killed run's recipe for one process, in a copy of what the run had left."""
    shutil.copytree(runs.killed, folder)
    raw = runs.resumed.model_dump(mode="json")
    raw |= {"output": str(folder), "engine": {"kind": "local"}, "cluster": {"workers": 1}}
    return Recipe.model_validate(raw | {"tracking": {"mlflow": {"enabled": False}}} | changes)


def test_a_run_of_two_ranks_continues_on_one(runs: Runs, tmp_path: Path):
    raw = runs.resumed.model_dump(mode="json")
    no_dropout = {"backbone": raw["backbone"] | {"dropout": 0.0}}
    recipe = continued(runs, tmp_path / "one", **no_dropout)
    with pytest.raises(RunFolderError, match="Continue it with --resume"):
        train_in_process(recipe, resume=False)
    result = train_in_process(recipe, resume=True)
    assert [entry["step"] for entry in lines(recipe.output) if entry["event"] == "step"] == [1, 2, 3, 4, 5, 6]
    expected = load_checkpoint(runs.results[0].checkpoint).tensors["generator"]
    got = load_checkpoint(result.checkpoint).tensors["generator"]
    # Other random numbers drop out on other ranks, so close is all that can be asked.
    assert all((got[name] - tensor).abs().max() < 0.01 for name, tensor in expected.items())


def test_a_checkpoint_of_another_site_map_is_an_error(runs: Runs, tmp_path: Path):
    adapters = [{"kind": "lora", "rank": 4, "alpha": 8, "targets": ["q", "v", "wo"]}]
    recipe = continued(runs, tmp_path / "other", adaptation={"adapters": adapters})
    with pytest.raises(CheckpointError, match="belongs to another run: the site map had") as error:
        train_in_process(recipe, resume=True)
    assert "Use the recipe.yaml beside the checkpoint" in str(error.value)


def test_weights_of_a_step_that_is_scored_and_saved_are_written_once(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """It is saved before it is scored, and the scores are added: a stop during any scoring repeats no step."""
    training = runs.resumed.training.model_dump() | {"evaluate_every": 1, "checkpoint_every": 1}
    recipe = continued(runs, tmp_path / "once", training=training)
    written: list[str] = []
    write, call = store.save_file, Evaluator.__call__

    def note(tensors: dict[str, torch.Tensor], file: Path) -> None:
        written.append(f"{file.parent.name} {file.stem}")
        write(tensors, file)

    def stop_at_five(evaluator: Evaluator, step: int, stage: str) -> Evaluation:
        if step == 5:
            raise KeyboardInterrupt
        return call(evaluator, step, stage)

    def both(*names: str) -> list[str]:
        return [f".{name}.partial {part}" for name in names for part in ("generator", "optimizer")]

    monkeypatch.setattr(store, "save_file", note)
    with monkeypatch.context() as stopping:
        stopping.setattr(Evaluator, "__call__", stop_at_five)
        with pytest.raises(KeyboardInterrupt):
            train_in_process(recipe, resume=True)
    assert written == both("step-000003-2", "step-000004", "step-000005")  # 3 was saved by another process, not scored
    four = load_checkpoint(str(Path(find_checkpoint(recipe.output)).with_name("step-000004")))
    assert max(record["step"] for record in four.state["evaluations"]) == 4
    written.clear()
    result = train_in_process(recipe, resume=True)
    assert written == both("step-000005-2", "step-000006")
    validated = [entry["step"] for entry in result.evaluations if entry["stage"] == VALIDATION]
    assert validated == [2, 3, 4, 5, 6]
    last = load_checkpoint(result.checkpoint)
    assert last.state["evaluations"] == list(result.evaluations)
    assert [entry["step"] for entry in lines(recipe.output) if entry["event"] == "step"] == [1, 2, 3, 4, 5, 6]


def test_a_run_stopped_during_scoring_repeats_no_step(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    recipe = continued(runs, tmp_path / "scored")
    call = Evaluator.__call__

    def stop_at_the_end(evaluator: Evaluator, step: int, stage: str) -> Evaluation:
        if step == STEPS:
            raise KeyboardInterrupt
        return call(evaluator, step, stage)

    with monkeypatch.context() as stopping:
        stopping.setattr(Evaluator, "__call__", stop_at_the_end)
        with pytest.raises(KeyboardInterrupt):
            train_in_process(recipe, resume=True)
    assert lines(recipe.output)[-1]["status"] == "stopped"
    stopped = load_checkpoint(find_checkpoint(recipe.output))
    assert stopped.step == STEPS
    result = train_in_process(recipe, resume=True)
    entries = lines(recipe.output)
    assert [entry["step"] for entry in entries if entry["event"] == "step"] == [1, 2, 3, 4, 5, 6]
    assert [entry["start_step"] for entry in entries if entry["event"] == "run_start"][-1] == STEPS
    stages = [(entry["stage"], entry["step"]) for entry in result.evaluations]
    assert stages[-3:] == [(VALIDATION, step) for step in (2, 4, 6)]
    ended = load_checkpoint(result.checkpoint)
    assert ended.state["evaluations"] == list(result.evaluations) != stopped.state["evaluations"]
    for name, tensor in stopped.tensors["generator"].items():
        assert torch.equal(tensor, ended.tensors["generator"][name]), name
