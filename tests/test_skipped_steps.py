"""A step whose loss or gradients are not finite changes nothing, and a run of them ends with what to do."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from hyperscale.checkpoint.store import CheckpointStore
from hyperscale.config.run import Recipe
from hyperscale.config.training import TrainingSettings
from hyperscale.engine.base import Engine, StepResult
from hyperscale.errors import EngineError
from hyperscale.training.callbacks import StepRecord
from hyperscale.training.trainer import Trainer
from tests import command
from tests.ranks import Ranks
from tests.runs import corpus_of, engine_of, loader_of, make_recipe

BAD_STEP = 2


def step_with(engine: Engine, recipe: Recipe, steps: Sequence[int], bad_rank: int) -> list[tuple[StepResult, Any]]:
    """Run these steps; in step `BAD_STEP` one element of one gradient of `bad_rank` is NaN. Return results and states.

    The batches of a step are the same whatever steps run before it.
    """
    rank, world_size = engine.collective.rank, recipe.cluster.workers
    corpus = corpus_of(recipe)
    loader = loader_of(recipe, corpus, rank, world_size)
    batches = [loader.next_step() for _ in range(max(steps) + 1)]
    parameter = next(iter(engine.model.generator.parameters()))
    outcome = []
    for step in steps:
        hook = parameter.register_hook(spoil) if (step, rank) == (BAD_STEP, bad_rank) else None
        outcome.append((engine.train_step(batches[step], step), engine.state()))
        if hook is not None:
            hook.remove()
    return outcome


def spoil(gradient: Tensor) -> Tensor:
    spoilt = gradient.clone()
    spoilt.view(-1)[0] = math.nan
    return spoilt


def flat(state: Any) -> dict[str, Tensor]:
    return {f"{part}/{name}": tensor for part, tensors in state.items() for name, tensor in tensors.items()}


def assert_equal(one: Any, other: Any) -> None:
    one, other = flat(one), flat(other)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def test_a_gradient_that_is_not_finite_changes_nothing(tiny_llama_folder: Path, tasks: list[str], tmp_path: Path):
    recipe = make_recipe(tiny_llama_folder, tasks, tmp_path)
    outcome = step_with(engine_of(recipe), recipe, [0, 1, 2, 3], bad_rank=0)
    results, states = [result for result, _ in outcome], [state for _, state in outcome]
    assert [result.is_finite for result in results] == [True, True, False, True]
    assert math.isfinite(results[BAD_STEP].loss)
    assert results[BAD_STEP].tokens > 0
    assert_equal(states[1], states[2])
    assert not torch.equal(*(next(iter(state["generator"].values())) for state in states[2:]))
    assert all(tensor.isfinite().all() for tensor in flat(states[3]).values())
    # And the next step does what it would have done had the bad one never been.
    without = step_with(engine_of(recipe), recipe, [0, 1, 3], bad_rank=0)
    assert_equal(states[3], without[2][1])


@pytest.mark.parametrize("loss", ["token_mean", "token_sum"])
def test_a_step_without_label_tokens_has_no_mean_loss(
    tiny_llama_folder: Path, tasks: list[str], tmp_path: Path, loss: str
):
    recipe = make_recipe(tiny_llama_folder, tasks, tmp_path, training={"loss": loss})
    engine, loader = engine_of(recipe), loader_of(recipe, corpus_of(recipe), 0, 1)
    before = engine.state()
    batches = [replace(batch, labels=torch.full_like(batch.labels, -100)) for batch in loader.next_step()]
    result = engine.train_step(batches, 0)
    assert (result.is_finite, result.task_losses) == (loss == "token_sum", {})
    assert result.loss == 0 or math.isnan(result.loss)
    if loss == "token_mean":
        assert_equal(before, engine.state())


def zero_steps(recipe: Recipe) -> list[tuple[StepResult, Any]]:
    return step_with(engine_of(recipe), recipe, [0, 1, 2, 3], bad_rank=1)


def test_all_ranks_skip_what_one_of_them_spoilt(
    two_ranks: Ranks, tiny_llama_folder: Path, tasks: list[str], tmp_path: Path
):
    recipe = make_recipe(tiny_llama_folder, tasks, tmp_path, engine={"kind": "zero"}, cluster={"workers": 2})
    ranks = two_ranks.run(zero_steps, recipe)
    for outcome in ranks:
        assert [result.is_finite for result, _ in outcome] == [True, True, False, True]
        assert_equal(outcome[1][1], outcome[2][1])
    for (_, first), (_, second) in zip(*ranks, strict=True):
        assert_equal(first, second)


def train_with(finite: Sequence[bool], **settings: int) -> tuple[list[StepRecord], list[int]]:
    """Run the loop over steps that are finite or not; return the records, and the steps that were saved."""
    records: list[StepRecord] = []
    saved: list[int] = []

    class Listener:
        def on_step(self, record: StepRecord) -> None:
            records.append(record)

    class Steps:
        def train_step(self, batches: object, step: int, is_last: bool) -> StepResult:
            good = StepResult(2.0, {1: 2.0}, 1e-3, 0.5, 64, 8)
            return good if finite[step] else replace(good, grad_norm=math.inf)

    class Rows:
        def next_step(self) -> list[object]:
            return []

    trainer = Trainer(
        engine=Steps(),  # type: ignore[arg-type]
        loader=Rows(),  # type: ignore[arg-type]
        settings=TrainingSettings.model_validate({"steps": len(finite), **settings}),
        task_names=("past", "plural"),
        callbacks=(Listener(),),  # type: ignore[arg-type]
        evaluate=lambda _: None,
        is_scored=lambda _: True,
        save=saved.append,
    )
    trainer.run(0)
    return records, saved


def test_skipped_steps_are_counted_and_nothing_is_saved_meanwhile(caplog: pytest.LogCaptureFixture):
    finite = [True, False, False, True, False, False, True]
    records, saved = train_with(finite, max_skipped_steps=2, checkpoint_every=1)
    assert [record.skipped_steps for record in records] == [0, 1, 2, 2, 3, 4, 4]
    assert saved == [1, 4, 7, 7]
    messages = [record.getMessage() for record in caplog.records]
    assert messages[0] == "skipped the update of step 2 (loss 2, gradient norm inf, tasks plural)"
    assert len(messages) == 4


@pytest.mark.parametrize(("limit", "words"), [(0, "in 1 step (training"), (2, "in 3 steps in a row (training")])
def test_too_many_in_a_row_end_the_run(limit: int, words: str):
    with pytest.raises(EngineError, match="Training has diverged") as ended:
        train_with([True, *[False] * 9], max_skipped_steps=limit, checkpoint_every=50)
    assert words in str(ended.value)
    assert "There is no checkpoint yet: start again with a lower learning rate" in str(ended.value)


def test_a_run_that_diverges_says_how_to_go_on_and_can(
    tiny_llama_folder: Path, tasks: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """The learning rate is so large that the first update makes every later loss NaN."""
    file, output = tmp_path / "recipe.yaml", tmp_path / "run"
    raw = make_recipe(tiny_llama_folder, tasks, output, training={"steps": 2, "checkpoint_every": 50})
    file.write_text(yaml.safe_dump(raw.model_dump(mode="json", exclude_unset=True)))
    train = ("train", file, "--launcher", "local")
    assert command.run(capsys, *train).code == 0
    diverged = command.run(
        capsys, *train, "--resume", "training.steps=20", "training.optimizer.learning_rate=1e30", "engine.kind=local"
    )
    assert diverged.code == 1
    assert len(diverged.errors) == 1
    assert "not finite in 6 steps in a row (training.max_skipped_steps=5)" in diverged.errors[0]
    assert (
        "Continue from step 2 with a lower learning rate: --resume training.optimizer.learning_rate=…"
        in (diverged.errors[0])
    )
    assert diverged.err.count("skipped the update of step") == 6
    assert CheckpointStore(str(output), 2).list() == (f"{output}/checkpoints/step-000002",)
    entries = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [entry["skipped_steps"] for entry in entries if entry["event"] == "step"][-6:] == [1, 2, 3, 4, 5, 6]
    assert (entries[-1]["event"], entries[-1]["status"]) == ("run_end", "failed")
    went_on = command.run(capsys, *train, "--resume", "training.steps=4", "training.optimizer.learning_rate=1e-3")
    assert went_on.code == 0, went_on.err
    assert CheckpointStore(str(output), 2).list()[-1].endswith("step-000004")
