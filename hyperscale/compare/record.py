"""The record of a finished run: everything that the table of a comparison needs, in one small file.

    records/shared_lr0.001_seed1.json.gz

Run folders hold checkpoints, rows, and paths of the machine that made them. A record holds none of these. It can be
committed with a table, and the records alone give the same table without training.
"""

import gzip
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hyperscale.checkpoint.store import find_checkpoint, load_checkpoint
from hyperscale.config.loading import recipe_without_destinations
from hyperscale.config.run import Recipe
from hyperscale.data.metrics import comparable, positive_answer
from hyperscale.data.tasks import MetricName, Task
from hyperscale.errors import RunFolderError
from hyperscale.run.context import RunResult
from hyperscale.run.predictions import read_predictions
from hyperscale.tracking.jsonl import read_entries
from hyperscale.tracking.metrics import main_score
from hyperscale.tracking.params import flatten
from hyperscale.tracking.provenance import package_versions
from hyperscale.training.callbacks import EvaluationRecord, StepRecord
from hyperscale.training.evaluation import VALIDATION

_SUFFIX = ".json.gz"


@dataclass(frozen=True)
class TaskAnswers:
    """One task's answers to the rows that a table scores, as `data.metrics.compute` takes them."""

    metrics: tuple[MetricName, ...]
    """The first is the main one."""
    positive: str | None
    """The answer that `f1` scores."""
    references: tuple[str, ...]
    predictions: tuple[str, ...]


@dataclass(frozen=True)
class RunRecord:
    """One finished run of a comparison."""

    recipe: Mapping[str, Any]
    """The resolved recipe without its destinations."""
    validation: Mapping[str, float]
    """task -> main score of the last validation, in percent."""
    answers: Mapping[str, TaskAnswers]
    """By task; empty for a run of the learning-rate search."""
    trained_parameters: int
    tokens: int
    """Real tokens of all training steps, all ranks."""
    step_seconds: float
    """Of the training steps alone."""
    versions: Mapping[str, str]
    """Package -> version that it ran with."""


def record_run(recipe: Recipe, result: RunResult, split: str | None) -> RunRecord:
    """Read the record of a finished run from its folder. `split`: the rows that the table scores; None = no rows."""
    folder = recipe.output
    steps = [entry.record for entry in read_entries(folder) if isinstance(entry.record, StepRecord)]
    return RunRecord(
        recipe=recipe_without_destinations(recipe),
        validation=_main_scores(result),
        answers=_answers(folder, split) if split else {},
        trained_parameters=result.trained_parameters,
        tokens=sum(step.tokens for step in steps),
        step_seconds=sum(step.step_seconds for step in steps),
        versions=package_versions(),
    )


def changed_setting(was: Recipe, now: Recipe) -> str | None:
    """Return the first setting in which two runs differ, with both values, or None."""
    before, after = flatten(recipe_without_destinations(was)), flatten(recipe_without_destinations(now))
    changed = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    return f"{changed[0]} was {before.get(changed[0])}, is {after.get(changed[0])}" if changed else None


def write_record(record: RunRecord, folder: Path, name: str) -> None:
    """Write a record, whole or not at all; the same record is the same bytes."""
    text = json.dumps(asdict(record), ensure_ascii=False)
    partial = folder / f".{name}.{os.getpid()}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(gzip.compress(text.encode(), mtime=0))
        partial.replace(folder / f"{name}{_SUFFIX}")
    except OSError as error:
        raise RunFolderError(f"records={folder} cannot be written: {error.strerror}; choose another folder") from error


def read_record(folder: Path, name: str) -> RunRecord | None:
    """Return a run's record, or None if it has none yet.

    Raises:
        RunFolderError: the file is damaged, or was written by another version.
    """
    file = folder / f"{name}{_SUFFIX}"
    if not file.is_file():
        return None
    try:
        values = json.loads(gzip.decompress(file.read_bytes()))
        answers = {
            task: TaskAnswers(tuple(of["metrics"]), of["positive"], tuple(of["references"]), tuple(of["predictions"]))
            for task, of in values["answers"].items()
        }
        return RunRecord(**{**values, "answers": answers})
    except (OSError, EOFError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise RunFolderError(
            f"{file} is damaged or of another version; restore it, or delete it to run that trial again"
        ) from error


def _answers(folder: str, split: str) -> dict[str, TaskAnswers]:
    """Read the answers, and the tasks as the run trained them: their labels may come from their rows."""
    task_fields = load_checkpoint(find_checkpoint(folder), only=()).state["tasks"]
    tasks = {task.name: task for task in map(Task.model_validate, task_fields)}
    answers = {}
    for name, stored_answers in read_predictions(folder, split).items():
        predictions, references = comparable(tasks[name], stored_answers.predictions, stored_answers.references)
        positive = positive_answer(tasks[name])
        answers[name] = TaskAnswers(tasks[name].metrics, positive, tuple(references), tuple(predictions))
    return answers


def _main_scores(result: RunResult) -> dict[str, float]:
    records = [EvaluationRecord(**record) for record in result.evaluations]
    last = next(record for record in reversed(records) if record.stage == VALIDATION)
    return {task: score for task, scores in last.scores.items() if (score := main_score(scores)) is not None}
