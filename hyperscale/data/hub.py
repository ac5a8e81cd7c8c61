"""Rows of Hugging Face data sets: columns renamed to ours, and class numbers replaced by the class names."""

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets

from hyperscale.assets.network import may_recover
from hyperscale.data.origins import SPLITS, HubSource, Split, unset_variable
from hyperscale.data.rows import Row
from hyperscale.errors import DataError, nearest


@dataclass(frozen=True)
class HubRows:
    """The rows of one split, read again at every iteration; one at a time if the data set is streamed."""

    split: Any
    columns: Mapping[str, str]
    named: Collection[str]
    where: str

    def __iter__(self) -> Iterator[Row]:
        ours = {theirs: ours for ours, theirs in self.columns.items()}
        features = self.split.features or {}
        names = {
            column: classes
            for column in self.named
            if (classes := _class_names(features.get(self.columns.get(column, column)))) is not None
        }
        for number, values in enumerate(self._values(), 1):
            renamed = {ours.get(column, column): value for column, value in values.items()}
            for column, classes in names.items():
                renamed[column] = _named(renamed[column], classes)
            yield Row(renamed, f"{self.where}:row {number}")

    def _values(self) -> Iterator[dict[str, Any]]:
        try:
            yield from self.split
        except _FAULTS as error:
            raise _unreadable(self.where, error, "") from error


def hub_content(source: HubSource) -> str:
    """Return what identifies the rows of a data set: its files' versions, as `datasets` names its own cache.

    Raises:
        DataError: the data set cannot be found or reached.
    """
    try:
        builder = datasets.load_dataset_builder(source.path, source.name, revision=source.revision)
    except _FAULTS as error:
        raise _unreadable(printable(source), error, _remedy(source)) from error
    folder = os.path.relpath(builder.cache_dir, datasets.config.HF_DATASETS_CACHE)
    return f"{folder} {sorted((source.splits or {}).items())} {sorted((source.columns or {}).items())}"


def open_hub(source: HubSource, named: Collection[str]) -> Mapping[Split, HubRows]:
    """Open the splits of a data set and rename its columns as the source says.

    In the columns `named` (our names), the numbers of a `ClassLabel`, or of a list of them, become class names.

    Raises:
        DataError: the data set cannot be found or reached, or a named split or column does not exist.
    """
    where = printable(source)
    try:
        dataset = datasets.load_dataset(source.path, source.name, revision=source.revision, streaming=source.streaming)
    except _FAULTS as error:
        raise _unreadable(where, error, _remedy(source)) from error
    names = source.splits or {split: split for split in SPLITS if split in dataset}
    for split in names.values():
        if split not in dataset:
            raise DataError(f"{where}: no split '{split}'.{nearest(split, dataset)} There are: {', '.join(dataset)}")
    columns = source.columns or {}
    for theirs in names.values():
        _check_columns(dataset[theirs], columns, f"{where}[{theirs}]")
    return {ours: HubRows(dataset[theirs], columns, named, f"{where}[{theirs}]") for ours, theirs in names.items()}


_FAULTS = (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError)


def _unreadable(where: str, error: Exception, remedy: str) -> DataError:
    reason = str(error).strip().partition("\n")[0]
    transient = isinstance(error, ConnectionError) and may_recover(error)
    return DataError(f"{where}: cannot be loaded: {reason}{remedy}", is_transient=transient)


def _check_columns(split: Any, columns: Mapping[str, str], where: str) -> None:
    if not columns:
        return
    names = split.column_names or list(next(iter(split), {}))  # a stream may not know its columns before its rows
    for column in columns.values():
        if column not in names:
            raise DataError(f"{where}: no column '{column}'.{nearest(column, names)} There are: {', '.join(names)}")


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


def _class_names(feature: Any) -> Sequence[str] | None:
    inner = getattr(feature, "feature", feature)
    return inner.names if isinstance(inner, datasets.ClassLabel) else None


def _named(value: Any, names: Sequence[str]) -> Any:
    if isinstance(value, list):
        return [_named(item, names) for item in value]
    return names[value] if value in range(len(names)) else value
