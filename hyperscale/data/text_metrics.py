"""Scores of free text, in percent: token F1, ROUGE, BLEU and chrF.

ROUGE is computed by `rouge-score`, BLEU and chrF by `sacrebleu`: `pip install hypernet-scale[metrics]`. `row_scores`
gives the metrics that are means over rows; BLEU and chrF count n-grams over all rows.
"""

import importlib
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hyperscale.errors import DataError

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_LIBRARIES = {
    "rouge1": ("rouge_score", "rouge-score"),
    "rouge2": ("rouge_score", "rouge-score"),
    "rougeL": ("rouge_score", "rouge-score"),
    "bleu": ("sacrebleu", "sacrebleu"),
    "chrf": ("sacrebleu", "sacrebleu"),
}
"""Metric -> the module that it imports, and the package that has it."""


def row_scores(name: str, predictions: Sequence[str], references: Sequence[str]) -> NDArray[np.float64]:
    """Return each row's score of a metric of `ROW_METRICS`, in percent [N]."""
    score = ROW_METRICS[name]()
    return np.array([100 * score(one, other) for one, other in zip(predictions, references, strict=True)])


def token_f1(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Return the mean F1 of words as in SQuAD: without case, punctuation and English articles.

    Rajpurkar et al. 2018 (arXiv 1806.03822): where one of the two has no words, the F1 is 1 if neither has.
    """
    return float(row_scores("token_f1", predictions, references).mean())


def rouge1(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Return the mean F of shared words, stemmed (Porter), of a-z and 0-9 alone: for English."""
    return float(row_scores("rouge1", predictions, references).mean())


def rouge2(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Return the mean F of shared pairs of words, as `rouge1`."""
    return float(row_scores("rouge2", predictions, references).mean())


def rougeL(predictions: Sequence[str], references: Sequence[str]) -> float:  # noqa: N802 (its published name)
    """Return the mean F of the longest common subsequence of words, as `rouge1`."""
    return float(row_scores("rougeL", predictions, references).mean())


def bleu(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Return corpus BLEU with sacrebleu's defaults: up to 4 words, tokenizer 13a, exponential smoothing."""
    return float(_library("bleu").corpus_bleu(list(predictions), [list(references)]).score)


def chrf(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Return corpus chrF2 with sacrebleu's defaults: up to 6 characters."""
    return float(_library("chrf").corpus_chrf(list(predictions), [list(references)]).score)


def check_available(name: str) -> None:
    """Raise `DataError` where a metric's library is not installed."""
    if name in _LIBRARIES:
        _library(name)


def _library(metric: str) -> Any:
    module, package = _LIBRARIES[metric]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(
            f"metric {metric} needs the package {package}: pip install 'hypernet-scale[metrics]' ({error})"
        ) from error


def _squad_f1(prediction: str, reference: str) -> float:
    predicted, true = _words(prediction), _words(reference)
    if not predicted or not true:
        return float(predicted == true)
    shared = sum((Counter(predicted) & Counter(true)).values())
    return 2 * shared / (len(predicted) + len(true))


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


@cache
def _rouge(name: str) -> Callable[[str, str], float]:
    _library(name)
    scorer = importlib.import_module("rouge_score.rouge_scorer").RougeScorer([name], use_stemmer=True)

    def score(prediction: str, reference: str) -> float:
        return float(scorer.score(reference, prediction)[name].fmeasure)

    return score


ROW_METRICS: Mapping[str, Callable[[], Callable[[str, str], float]]] = {
    "token_f1": lambda: _squad_f1,
    "rouge1": lambda: _rouge("rouge1"),
    "rouge2": lambda: _rouge("rouge2"),
    "rougeL": lambda: _rouge("rougeL"),
}
"""Metrics that are the mean of a score of each row -> a function that returns that score's function, as a fraction."""
