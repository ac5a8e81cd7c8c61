"""Scores of answers against references, all in percent."""

import re
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from sklearn.metrics import f1_score, matthews_corrcoef

from hyperscale.data import templates
from hyperscale.data.examples import Example
from hyperscale.data.metric_table import F1, Metric, metric
from hyperscale.data.tagging import WRITINGS
from hyperscale.data.tasks import Task
from hyperscale.errors import DataError

Span = tuple[str, int, int]
"""Type, first word, and the word after the last one."""

_TAG = re.compile(r"O|[BI]-\S+")


def compute(
    names: Sequence[str], predictions: Sequence[str], references: Sequence[str], positive: str | None = None
) -> dict[str, float]:
    """Return each metric in percent; outer spaces do not count.

    `positive` is the answer whose F1 `f1` reports and is needed for it alone. `score` takes it from the task.
    """
    predicted, expected = [text.strip() for text in predictions], [text.strip() for text in references]
    if not expected or len(predicted) != len(expected):
        raise ValueError(f"{len(predicted)} predictions for {len(expected)} references")
    scores = {}
    for name in names:
        scores[name] = f1(predicted, expected, positive) if name == F1 else float(metric(name)(predicted, expected))
    return scores


def score(task: Task, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Return the task's metrics in percent, the main one first."""
    return compute(task.metrics, *comparable(task, predictions, references), positive_answer(task))


def comparable(task: Task, predictions: Sequence[str], references: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return predictions and references as `compute` takes them.

    Those of sequence labelling become BIO tags with spaces between them, one for each word of the reference: what the
    words are is not in them any more. Others stay as they are.
    """
    if task.tagging is None or task.tagging.format is None:
        return list(predictions), list(references)
    writing = WRITINGS[task.tagging.format]
    expected = [writing.reference(text) for text in references]
    answered = [writing.tags(text, sentence.words) for text, sentence in zip(predictions, expected, strict=True)]
    return [" ".join(tags) for tags in answered], [" ".join(sentence.tags) for sentence in expected]


def positive_answer(task: Task) -> str | None:
    """Return the answer whose F1 a task's `f1` is, or None where it names none."""
    if task.positive_label is None:
        return None
    answer = templates.parse(task.target)
    return answer.render(dict.fromkeys(answer.columns, task.positive_label)).strip()


def f1_counts(
    metric: str, predictions: Sequence[str], references: Sequence[str], positive: str | None = None
) -> NDArray[np.int64]:
    """Return the counts from which `f1` or `span_f1` of any choice of rows follows, as `compute` counts them.

    Returns:
        [N, 3]: right answers (for `span_f1` spans), given ones, and ones of the references, row by row.
    """
    predicted, expected = [text.strip() for text in predictions], [text.strip() for text in references]
    if metric == "f1":
        pairs = zip(predicted, expected, strict=True)
        rows = [(int(one == other == positive), int(one == positive), int(other == positive)) for one, other in pairs]
    else:
        spans = zip(*_span_sets(predicted, expected), strict=True)
        rows = [(len(one & other), len(one), len(other)) for one, other in spans]
    return np.array(rows, dtype=np.int64).reshape(-1, 3)


def majority_score(task: Task, answer: str, evaluation: Sequence[Example]) -> dict[str, float]:
    """Return what always giving the most common training answer scores.

    Of sequence labelling it is what leaving every word outside scores: `O` is its most common answer.
    """
    prediction = "" if task.tagging is not None else answer
    return score(task, [prediction] * len(evaluation), [example.target for example in evaluation])


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Return how many answers are equal to their references, in percent."""
    hits = [predicted == expected for predicted, expected in zip(predictions, references, strict=True)]
    return 100 * float(np.mean(hits))


accuracy = exact_match


def f1(predictions: Sequence[str], references: Sequence[str], positive: str | None = None) -> float:
    """Return the F1 of the answer `positive`, in percent."""
    if positive is None:
        raise ValueError("f1 needs the positive answer")
    hits = [[text == positive for text in texts] for texts in (references, predictions)]
    return 100 * float(f1_score(*hits, zero_division=0))


def macro_f1(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Return the mean of all answers' F1, in percent."""
    return 100 * float(f1_score(references, predictions, average="macro", zero_division=0))


def mcc(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Return Matthews' correlation, times 100."""
    return 100 * float(matthews_corrcoef(references, predictions))


def _correlation(measure: Callable[..., tuple[float, float]]) -> Metric:
    def correlate(predictions: Sequence[str], references: Sequence[str]) -> float:
        expected = np.array([_number(text) for text in references])
        if np.isnan(expected).any():
            text = references[int(np.flatnonzero(np.isnan(expected))[0])]
            raise DataError(f"pearson and spearman compare numbers, but a row's answer is '{text}'")
        predicted = np.array([_number(text) for text in predictions])
        # An answer that is not a number counts as the mean, which neither adds nor removes correlation.
        predicted = np.where(np.isnan(predicted), expected.mean(), predicted)
        if np.ptp(predicted) == 0 or np.ptp(expected) == 0:
            return 0.0
        return 100 * float(measure(predicted, expected)[0])

    return correlate


pearson = _correlation(stats.pearsonr)
spearman = _correlation(stats.spearmanr)


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        return float("nan")
    return value if np.isfinite(value) else float("nan")


def span_f1(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Return the micro F1 of whole spans in strict BIO (IOB2), in percent.

    An answer is one tag for each tag of its reference.
    """
    predicted, true = _span_sets(predictions, references)
    right = sum(len(one & other) for one, other in zip(predicted, true, strict=True))
    if not right:
        return 0.0
    precision, recall = right / sum(map(len, predicted)), right / sum(map(len, true))
    return 100 * 2 * precision * recall / (precision + recall)


def _span_sets(predictions: Sequence[str], references: Sequence[str]) -> tuple[list[set[Span]], list[set[Span]]]:
    expected = [text.split() for text in references]
    predicted = [_tags(text, len(tags)) for text, tags in zip(predictions, expected, strict=True)]
    return list(map(_spans, predicted)), list(map(_spans, expected))


def _spans(tags: Sequence[str]) -> set[Span]:
    """Return the spans of one sentence. B-x begins a span and I-x continues an open one of x; another I- is outside."""
    spans: set[Span] = set()
    kind, start = "", 0
    for place, tag in enumerate([*tags, "O"]):
        if kind and tag != f"I-{kind}":
            spans.add((kind, start, place))
            kind = ""
        if tag.startswith("B-"):
            kind, start = tag[2:], place
    return spans


def _tags(text: str, count: int) -> list[str]:
    tags = [tag if _TAG.fullmatch(tag) else "O" for tag in text.split()]
    return (tags + ["O"] * count)[:count]
