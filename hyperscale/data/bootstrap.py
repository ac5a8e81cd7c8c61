"""How sure a difference of scores is: the same rows and seeds drawn again and again, for all methods alike."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hyperscale.data.metrics import score
from hyperscale.data.tasks import Task

Scores = NDArray[np.float64]

_PER_ROW = ("accuracy", "exact_match")
"""Metrics that are means over rows: resampling them is an average of hits."""


def resampled_scores(
    task: Task, references: Sequence[str], predictions: Sequence[Sequence[str]], rows: NDArray[np.int64]
) -> Scores:
    """Return the task's main score, in percent, of each run on each resample.

    Args:
        references: N answers.
        predictions: per run N answers, to the same rows.
        rows: [R, N] row numbers drawn with replacement, the same for all runs.

    Returns:
        [runs, R].
    """
    if task.metrics[0] in _PER_ROW and task.tagging is None:
        expected = np.array([text.strip() for text in references])
        hits = np.stack([np.array([text.strip() for text in run]) == expected for run in predictions])
        return np.stack([100.0 * hits[:, drawn].mean(axis=1) for drawn in rows], axis=1)
    main = task.model_copy(update={"metrics": task.metrics[:1]})
    return np.array(
        [
            [
                score(main, [run[row] for row in drawn], [references[row] for row in drawn])[task.metrics[0]]
                for drawn in rows
            ]
            for run in predictions
        ]
    )


def draw(generator: np.random.Generator, resamples: int, size: int) -> NDArray[np.int64]:
    """Return [resamples, size] numbers below `size`, with replacement."""
    return generator.integers(0, size, (resamples, size))


def interval(differences: Scores) -> tuple[float, float]:
    """Return the middle 95 % of resampled differences [R]."""
    low, high = np.percentile(differences, (2.5, 97.5))
    return float(low), float(high)
