"""`hyperscale evaluate`: score a checkpoint again, in one process and without sharding."""

from collections.abc import Sequence
from typing import Literal

import torch

from hyperscale.checkpoint.store import find_checkpoint, load_checkpoint
from hyperscale.config.cluster import ClusterSettings
from hyperscale.config.loading import change_recipe, parse_recipe
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
    """Return the scores of the majority class and of a checkpoint; `path` may be a run folder for its newest one.

    Args:
        stage: `validation` or `test`, the split to score; tasks without test rows are left out of `test`.
        overrides: `dotted.key=value` of the checkpoint's recipe, such as the path of its backbone on this machine.
        device: `auto` = a GPU if both the run and this machine have one, else the CPU.

    Raises:
        CheckpointError: there is no checkpoint, or its backbone has changed.
        ConfigError: an override is wrong.
        DataError: no task has this split, or rows cannot be read.
        EngineError: `device` is `cuda`, but there is no CUDA device.
    """
    checkpoint = load_checkpoint(find_checkpoint(path))
    before = parse_recipe(checkpoint.recipe, "the checkpoint's recipe")
    overridden = change_recipe(before, {}, overrides, "the checkpoint's recipe")
    changes = {
        "engine.kind": "local",
        "cluster.workers": 1,
        "cluster.gpus_per_worker": _gpus(overridden.cluster, device),
        "training.evaluate_test": stage == TEST,
    }
    recipe = change_recipe(overridden, changes, (), "the checkpoint's recipe")
    with ProgressDisplay(recipe.tracking.progress) as display:
        context = WorkerContext(0, 1, 0, "local", display.consume, RunIdentity.new(recipe.name))
        return evaluate_worker(recipe, context, checkpoint, stage)


def _gpus(cluster: ClusterSettings, device: Device) -> int:
    if device != "auto":
        return 1 if device == "cuda" else 0
    if not cluster.gpus_per_worker:
        return 0
    if torch.cuda.is_available():
        return 1
    _logger.warning("the run used GPUs, but this machine has no CUDA device: evaluating on the CPU")
    return 0
