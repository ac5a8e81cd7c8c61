"""The table of metrics: a name in a task file -> the function that computes it.

Names are checked when a task is read, so this module imports no library; a function is imported when it is needed.
"""

from collections.abc import Callable, Sequence
from typing import cast

from hyperscale.config.plugins import Registry, import_object
from hyperscale.errors import DataError, nearest

Metric = Callable[[Sequence[str], Sequence[str]], float]
"""Takes predictions and references, as many of each, without outer spaces; returns a score in percent."""

_LABELS_AND_NUMBERS = ("accuracy", "exact_match", "macro_f1", "mcc", "pearson", "spearman", "span_f1")
_TEXTS = ("token_f1", "rouge1", "rouge2", "rougeL", "bleu", "chrf")
F1 = "f1"
"""Also needs the positive answer; `metrics.compute` has it."""

METRICS: Registry[str | Metric] = Registry(
    "metric",
    "hyperscale.metrics",
    {
        **{name: f"hyperscale.data.metrics:{name}" for name in (*_LABELS_AND_NUMBERS, F1)},
        **{name: f"hyperscale.data.text_metrics:{name}" for name in _TEXTS},
    },
)


def register_metric(name: str, function: str | Metric) -> None:
    """Add a metric, for task files to name.

    Args:
        name: letters, digits and `_`; it becomes part of the names under which scores are recorded.
        function: takes a sequence of predictions and one of references, and returns a score in percent: larger is
            better, at most 100. Or its import path `package.module:name`, which is imported when a task is scored.

    Raises:
        PluginError: the name is taken.
        ValueError: the name holds other characters.

    Example:
        >>> def length_ratio(predictions, references):
        ...     return 100 * min(1.0, sum(map(len, predictions)) / sum(map(len, references)))
        >>> hs.register_metric("length_ratio", length_ratio)
    """
    if not name.replace("_", "").isalnum() or not name.isascii():
        raise ValueError(f"metric name '{name}' may hold only letters, digits and _")
    METRICS.register(name, function)


def metric(name: str) -> Metric:
    """Return what computes a metric.

    Raises:
        DataError: neither the package nor a plug-in has it.
    """
    function = METRICS.find(name)
    if function is None:
        raise DataError(f"metric {name} is in no installed package; install the one that the run was scored with")
    return cast(Metric, import_object(function)) if isinstance(function, str) else function


def check_metric(name: str) -> str:
    """Return the name of a metric.

    Raises:
        ValueError: neither the package nor a plug-in has it.
    """
    if METRICS.find(name) is None:
        known = ", ".join(METRICS)
        raise ValueError(f"'{name}' is not allowed: must be one of {known}.{nearest(name, list(METRICS))}".rstrip("."))
    return name
