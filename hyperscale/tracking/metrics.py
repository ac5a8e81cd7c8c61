"""The names under which a run's numbers are recorded.

train/loss  train/<task>/loss  train/learning_rate  train/grad_norm
train/skipped_steps                   updates left out so far (loss or gradient norm not finite)
throughput/tokens_per_second  throughput/step_seconds
eval/<task>/<metric>  eval/mean       the run's own validation scores
untouched/…  majority/…  test/…       the same for the baselines and the test split

The names are stable, because people compare runs by them. The MLflow UI groups charts by the part before the slash.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from hyperscale.training.callbacks import EvaluationRecord, RunFacts, StepRecord

_STAGES = {"validation": "eval"}


@dataclass(frozen=True)
class Point:
    """One value of one metric."""

    key: str
    value: float
    step: int
    time: float
    """Seconds since the epoch."""


def points(values: Mapping[str, float], step: int, time: float) -> list[Point]:
    """Return the values of one moment as points."""
    return [Point(key, value, step, time) for key, value in values.items()]


def run_metrics(facts: RunFacts) -> dict[str, float]:
    """Return the numbers that are known before the first step."""
    return {
        "model/trained_parameters": facts.trained_parameters,
        "model/total_parameters": facts.total_parameters,
        "model/trained_percent": 100 * facts.trained_parameters / max(facts.total_parameters, 1),
    }


def step_metrics(record: StepRecord) -> dict[str, float]:
    """Return the numbers of one optimizer step."""
    return {
        "train/loss": record.loss,
        **{f"train/{key_part(task)}/loss": loss for task, loss in record.task_losses.items()},
        "train/learning_rate": record.learning_rate,
        "train/grad_norm": record.grad_norm,
        "train/skipped_steps": record.skipped_steps,
        "throughput/tokens_per_second": record.tokens_per_second,
        "throughput/step_seconds": record.step_seconds,
    }


def evaluation_metrics(record: EvaluationRecord) -> dict[str, float]:
    """Return the scores of one evaluation, in percent, and their mean."""
    prefix = _STAGES.get(record.stage, record.stage)
    metrics = {
        f"{prefix}/{key_part(task)}/{key_part(metric)}": value
        for task, scores in record.scores.items()
        for metric, value in scores.items()
    }
    mean = mean_score(record.scores)
    return metrics if mean is None else metrics | {f"{prefix}/mean": mean}


def main_score(scores: Mapping[str, float]) -> float | None:
    """Return a task's main score, which is that of its first metric."""
    return next(iter(scores.values()), None)


def mean_score(scores: Mapping[str, Mapping[str, float]]) -> float | None:
    """Return the mean of the tasks' main scores, or None if there are none."""
    main = [score for task in scores.values() if (score := main_score(task)) is not None]
    return sum(main) / len(main) if main else None


def key_part(name: str) -> str:
    """Return a task or metric name as a part of a key. MLflow allows letters, digits and `_ - .` there."""
    return re.sub(r"[^\w.-]", "_", name, flags=re.ASCII)
