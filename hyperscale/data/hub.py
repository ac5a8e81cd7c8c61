"""Rows of Hugging Face data sets: columns renamed to ours, and class numbers replaced by the class names."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import datasets

from hyperscale.assets.network import may_recover
from hyperscale.data.origins import SPLITS, HubSource, Split, unset_variable
from hyperscale.data.rows import Row
from hyperscale.errors import DataError, nearest


def open_hub(source: HubSource, named: Collection[str]) -> Mapping[Split, Sequence[Row]]:
    """Load the splits of a data set and rename its columns as the source says.

    In the columns `named` (our names), the numbers of a `ClassLabel`, or of a list of them, become class names.

    Raises:
        DataError: the data set cannot be found or reached, or a named split or column does not exist.
    """
    where = printable(source)
    try:
        dataset = datasets.load_dataset(source.path, source.name, revision=source.revision)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().partition("\n")[0]
        transient = isinstance(error, ConnectionError) and may_recover(error)
        raise DataError(f"{where}: cannot be loaded: {reason}{_remedy(source)}", is_transient=transient) from error
    names = source.splits or {split: split for split in SPLITS if split in dataset}
    for split in names.values():
        if split not in dataset:
            raise DataError(f"{where}: no split '{split}'.{nearest(split, dataset)} There are: {', '.join(dataset)}")
    columns = source.columns or {}
    return {ours: _rows(dataset[theirs], columns, named, f"{where}[{theirs}]") for ours, theirs in names.items()}


def _remedy(source: HubSource) -> str:
    if source.folder is None:
        return ""
    name = unset_variable(source.folder)
    missing = f"the variable {name} is not set" if name else "there is no such folder"
    return f". The rows can also be read from {source.folder} ({missing})"


def printable(source: HubSource) -> str:
    """Return a data set's address in one word, such as `hub:nyu-mll/glue/sst2@main`."""
    name = f"/{source.name}" if source.name else ""
    return f"hub:{source.path}{name}" + (f"@{source.revision}" if source.revision else "")


def _rows(split: Any, columns: Mapping[str, str], named: Collection[str], where: str) -> list[Row]:
    for theirs in columns.values():
        if theirs not in split.column_names:
            there = ", ".join(split.column_names)
            raise DataError(f"{where}: no column '{theirs}'.{nearest(theirs, split.column_names)} There are: {there}")
    ours = {theirs: ours for ours, theirs in columns.items()}
    names = {
        column: classes
        for column in named
        if (classes := _class_names(split.features.get(columns.get(column, column)))) is not None
    }
    rows = []
    for number, values in enumerate(split, 1):
        renamed = {ours.get(column, column): value for column, value in values.items()}
        for column, classes in names.items():
            renamed[column] = _named(renamed[column], classes)
        rows.append(Row(renamed, f"{where}:row {number}"))
    return rows


def _class_names(feature: Any) -> Sequence[str] | None:
    inner = getattr(feature, "feature", feature)
    return inner.names if isinstance(inner, datasets.ClassLabel) else None


def _named(value: Any, names: Sequence[str]) -> Any:
    if isinstance(value, list):
        return [_named(item, names) for item in value]
    return names[value] if value in range(len(names)) else value
