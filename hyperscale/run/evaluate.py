"""`hyperscale evaluate`: a checkpoint's scores again, in one process and without sharding."""

from typing import Any

from hyperscale.checkpoint.store import find_checkpoint, load_checkpoint
from hyperscale.config.loading import parse_recipe
from hyperscale.run.context import RunIdentity, WorkerContext
from hyperscale.run.worker import evaluate_worker
from hyperscale.terminal.display import ProgressDisplay
from hyperscale.training.callbacks import EvaluationRecord
from hyperscale.training.evaluation import TEST


def evaluate_checkpoint(path: str, stage: str) -> list[EvaluationRecord]:
    """Return the scores of a checkpoint, or of a run folder's newest one, and those of the majority class.

    Args:
        stage: `validation` or `test`, the split to score; tasks without test rows are left out of `test`.

    Raises:
        CheckpointError: there is none, or the backbone has changed since.
        DataError: no task has such a split, or rows cannot be read.
    """
    checkpoint = load_checkpoint(find_checkpoint(path))
    raw: dict[str, Any] = dict(checkpoint.recipe)
    raw["engine"] = {**raw["engine"], "kind": "local"}
    raw["cluster"] = {**raw["cluster"], "workers": 1}
    raw["training"] = {**raw["training"], "evaluate_test": stage == TEST}
    recipe = parse_recipe(raw, "the checkpoint's recipe")
    with ProgressDisplay(recipe.tracking.progress) as display:
        context = WorkerContext(0, 1, 0, "local", display.consume, RunIdentity.new(recipe.name))
        return evaluate_worker(recipe, context, checkpoint, stage)
