"""Rows of Hugging Face data sets, label numbers already replaced by their names."""

from collections.abc import Mapping, Sequence
from typing import Any

import datasets

from hyperscale.data.rows import Row
from hyperscale.data.tasks import SPLITS, HubSource, Split
from hyperscale.errors import DataError, nearest
from hyperscale.logger import get_logger

_logger = get_logger(__name__)


def open_hub(source: HubSource, label_column: str | None, name_labels: bool) -> Mapping[Split, Sequence[Row]]:
    """Load the splits of a data set.

    With `name_labels` the numbers of a `ClassLabel` column become its names. A split whose labels are all -1 (the
    hidden test sets of GLUE) is left out.

    Raises:
        DataError: the data set cannot be found or reached, or a named split does not exist.
    """
    where = printable(source)
    try:
        found = datasets.load_dataset(source.path, source.name, revision=source.revision)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise DataError(f"{where}: cannot be loaded: {reason}") from error
    wanted = source.splits or {split: split for split in SPLITS if split in found}
    for split in wanted.values():
        if split not in found:
            raise DataError(f"{where}: no split '{split}'.{nearest(split, found)} There are: {', '.join(found)}")
    opened: dict[Split, list[Row]] = {}
    for ours, theirs in wanted.items():
        split, origin = found[theirs], f"{where}[{theirs}]"
        if label_column in split.column_names and len(split) and set(split[label_column]) == {-1}:
            _logger.info("%s has no labels and is left out", origin)
        else:
            opened[ours] = _rows(split, label_column if name_labels else None, origin)
    return opened


def printable(source: HubSource) -> str:
    """Return a data set's address in one word, such as `hub:nyu-mll/glue/sst2@main`."""
    name = f"/{source.name}" if source.name else ""
    return f"hub:{source.path}{name}" + (f"@{source.revision}" if source.revision else "")


def _rows(split: Any, label_column: str | None, where: str) -> list[Row]:
    feature = split.features.get(label_column)
    names = feature.names if isinstance(feature, datasets.ClassLabel) else ()
    return [Row(_named(values, label_column, names), f"{where}:row {number}") for number, values in enumerate(split, 1)]


def _named(values: dict[str, Any], column: str | None, names: Sequence[str]) -> dict[str, Any]:
    if column is None or values.get(column) not in range(len(names)):
        return values
    return {**values, column: names[values[column]]}
