"""Intervals of score differences, from rows and seeds that are resampled alike for all methods."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from hyperscale.data.metrics import compute, f1_counts
from hyperscale.data.text_metrics import ROW_METRICS, row_scores

Scores = NDArray[np.float64]

_MEANS = ("accuracy", "exact_match")


def resampled_scores(
    metric: str,
    references: Sequence[str],
    predictions: Sequence[Sequence[str]],
    rows: NDArray[np.int64],
    positive: str | None = None,
) -> Scores:
    """Return a metric, in percent, of each run on each resample.

    Args:
        metric: as `compute` knows it. Means over rows and F1 come from counts that are made once for each row.
        references: N answers, as `comparable` returns them.
        predictions: per run N answers, to the same rows.
        rows: [R, N] row numbers drawn with replacement, the same for all runs.
        positive: the answer that `f1` scores.

    Returns:
        [runs, R].
    """
    if metric in _MEANS:
        expected = np.array([text.strip() for text in references])
        hits = np.stack([np.array([text.strip() for text in run]) == expected for run in predictions])
        return np.stack([100.0 * hits[:, drawn].mean(axis=1) for drawn in rows], axis=1)
    if metric in ROW_METRICS:
        texts = [text.strip() for text in references]
        scores = [row_scores(metric, [text.strip() for text in run], texts) for run in predictions]
        return np.stack([np.stack(scores)[:, drawn].mean(axis=1) for drawn in rows], axis=1)
    if metric == "f1" or metric == "span_f1":
        counts = np.stack([f1_counts(metric, run, references, positive) for run in predictions])
        sums = np.stack([counts[:, drawn].sum(axis=1) for drawn in rows], axis=1)
        either = sums[..., 1] + sums[..., 2]
        return np.where(either > 0, 200.0 * sums[..., 0] / np.maximum(either, 1), 0.0)
    return np.array(
        [
            [
                compute((metric,), [run[row] for row in drawn], [references[row] for row in drawn], positive)[metric]
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


def seed_interval(differences: Sequence[float]) -> tuple[float, float] | None:
    """Return Student's 95 % interval of a mean difference from one value a seed; None with one seed.

    A bootstrap over three seeds underestimates how far seeds lie apart; this interval does not.
    """
    if len(differences) < 2:
        return None
    half = float(stats.t.ppf(0.975, len(differences) - 1) * stats.sem(differences))
    mean = float(np.mean(differences))
    return mean - half, mean + half
