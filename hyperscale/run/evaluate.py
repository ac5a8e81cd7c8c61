"""`hyperscale evaluate`: score a checkpoint again, in one process and without sharding."""

from collections.abc import Sequence
from typing import Literal

import torch

from hyperscale.checkpoint.store import find_checkpoint, load_checkpoint
from hyperscale.config.loading import change_recipe, parse_recipe
from hyperscale.config.run import Recipe
from hyperscale.logger import get_logger
from hyperscale.run.context import RunIdentity, WorkerContext
from hyperscale.run.worker import evaluate_worker
from hyperscale.terminal.display import ProgressDisplay
from hyperscale.training.callbacks import EvaluationRecord
from hyperscale.training.evaluation import TEST

_logger = get_logger(__name__)

Device = Literal["auto", "cpu", "cuda"]


def evaluate_checkpoint(
    path: str, stage: str, overrides: Sequence[str] = (), device: Device = "auto"
) -> list[EvaluationRecord]:
    """Return the scores of a checkpoint, or of a run folder's newest one, and those of the majority class.

    Args:
        stage: `validation` or `test`, the split to score; tasks without test rows are left out of `test`.
        overrides: `dotted.key=value` of the checkpoint's recipe, such as the place of its backbone on this machine.
        device: `auto` = a GPU if the run had one and this machine has one, else the CPU.

    Raises:
        CheckpointError: there is none, or the backbone has changed since.
        ConfigError: an override is wrong.
        DataError: no task has such a split, or rows cannot be read.
        EngineError: `device` is `cuda`, and there is no CUDA device.
    """
    checkpoint = load_checkpoint(find_checkpoint(path))
    before = parse_recipe(checkpoint.recipe, "the checkpoint's recipe")
    wanted = change_recipe(before, {}, overrides, "the checkpoint's recipe")
    changes = {
        "engine.kind": "local",
        "cluster.workers": 1,
        "cluster.gpus_per_worker": _gpus(wanted, device),
        "training.evaluate_test": stage == TEST,
    }
    recipe = change_recipe(wanted, changes, (), "the checkpoint's recipe")
    with ProgressDisplay(recipe.tracking.progress) as display:
        context = WorkerContext(0, 1, 0, "local", display.consume, RunIdentity.new(recipe.name))
        return evaluate_worker(recipe, context, checkpoint, stage)


def _gpus(recipe: Recipe, device: Device) -> int:
    if device != "auto":
        return 1 if device == "cuda" else 0
    if not recipe.cluster.gpus_per_worker:
        return 0
    if torch.cuda.is_available():
        return 1
    _logger.warning("the run used GPUs, and this machine has no CUDA device: evaluating on the CPU")
    return 0
