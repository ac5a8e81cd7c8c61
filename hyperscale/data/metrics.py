"""Scores of answers against references, all in percent."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from seqeval.metrics import f1_score as span_f1_score
from seqeval.scheme import IOB2, Entities
from sklearn.metrics import f1_score, matthews_corrcoef

from hyperscale.data import templates
from hyperscale.data.examples import Example
from hyperscale.data.tagging import WRITINGS
from hyperscale.data.tasks import MetricName, Task
from hyperscale.errors import DataError

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
        if name == "f1":
            scores[name] = 100 * _f1(predicted, expected, positive)
        else:
            scores[name] = 100 * METRICS[name](predicted, expected)
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
    metric: Literal["f1", "span_f1"], predictions: Sequence[str], references: Sequence[str], positive: str | None = None
) -> NDArray[np.int64]:
    """Return what the F1 of any choice of rows is made of, as `compute` would count it.

    Returns:
        [N, 3]: right answers (for `span_f1` spans), given ones, and ones of the references, row by row.
    """
    predicted, expected = [text.strip() for text in predictions], [text.strip() for text in references]
    if metric == "f1":
        given, true = ([{positive} & {text} for text in texts] for texts in (predicted, expected))
    else:
        tags = [text.split() for text in expected]
        given, true = _spans([_tags(text, len(of)) for text, of in zip(predicted, tags, strict=True)]), _spans(tags)
    rows = [(len(one & other), len(one), len(other)) for one, other in zip(given, true, strict=True)]
    return np.array(rows, dtype=np.int64).reshape(-1, 3)


def majority_score(task: Task, train: Sequence[Example], evaluation: Sequence[Example]) -> dict[str, float]:
    """Return what always giving the most common training answer scores; of equally common ones the first in order.

    Of sequence labelling it is what leaving every word outside scores: `O` is its most common answer.
    """
    if task.tagging is not None:
        return score(task, [""] * len(evaluation), [example.target for example in evaluation])
    counts = Counter(example.target for example in train)
    answer = min(counts, key=lambda target: (-counts[target], target))
    return score(task, [answer] * len(evaluation), [example.target for example in evaluation])


def _matches(predictions: Sequence[str], references: Sequence[str]) -> float:
    return float(np.mean([predicted == expected for predicted, expected in zip(predictions, references, strict=True)]))


def _f1(predictions: Sequence[str], references: Sequence[str], positive: str | None) -> float:
    if positive is None:
        raise ValueError("f1 needs the positive answer")
    hits = [[text == positive for text in texts] for texts in (references, predictions)]
    return float(f1_score(*hits, zero_division=0))


def _macro_f1(predictions: Sequence[str], references: Sequence[str]) -> float:
    return float(f1_score(references, predictions, average="macro", zero_division=0))


def _mcc(predictions: Sequence[str], references: Sequence[str]) -> float:
    return float(matthews_corrcoef(references, predictions))


def _correlation(measure: Callable[..., tuple[float, float]]) -> Callable[[Sequence[str], Sequence[str]], float]:
    def correlate(predictions: Sequence[str], references: Sequence[str]) -> float:
        expected = np.array([_number(text) for text in references])
        if np.isnan(expected).any():
            text = references[int(np.flatnonzero(np.isnan(expected))[0])]
            raise DataError(f"pearson and spearman compare numbers, but a row's answer is '{text}'")
        predicted = np.array([_number(text) for text in predictions])
        # An answer that is no number says nothing: the mean neither earns nor loses correlation.
        predicted = np.where(np.isnan(predicted), expected.mean(), predicted)
        if np.ptp(predicted) == 0 or np.ptp(expected) == 0:
            return 0.0
        return float(measure(predicted, expected)[0])

    return correlate


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        return float("nan")
    return value if np.isfinite(value) else float("nan")


def _span_f1(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Micro F1 over spans in the strict sense of BIO: an answer is one tag for each tag of its reference."""
    expected = [text.split() for text in references]
    predicted = [_tags(text, len(tags)) for text, tags in zip(predictions, expected, strict=True)]
    return float(span_f1_score(expected, predicted, mode="strict", scheme=IOB2, zero_division=0))


def _spans(sentences: Sequence[list[str]]) -> list[set[Any]]:
    found = Entities(list(sentences), scheme=IOB2).entities
    # spans carry the number of their sentence, which is the same on both sides
    return [{span.to_tuple() for span in spans} for spans in found]


def _tags(text: str, count: int) -> list[str]:
    tags = [tag if _TAG.fullmatch(tag) else "O" for tag in text.split()]
    return (tags + ["O"] * count)[:count]


METRICS: Mapping[MetricName | str, Callable[[Sequence[str], Sequence[str]], float]] = {
    "accuracy": _matches,
    "exact_match": _matches,
    "macro_f1": _macro_f1,
    "mcc": _mcc,
    "pearson": _correlation(stats.pearsonr),
    "spearman": _correlation(stats.spearmanr),
    "span_f1": _span_f1,
}
