"""Opens a task's source and returns its examples by split, ready for tokenisation."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from hyperscale.assets.datasets import open_dataset
from hyperscale.data import templates
from hyperscale.data.examples import Example, label_value, renderer
from hyperscale.data.file_digest import file_digest
from hyperscale.data.hub import hub_content, open_hub, printable
from hyperscale.data.origins import SPLITS, AssetSource, FileSource, HubSource, Split, unset_variable
from hyperscale.data.rendering import hashed, render_chunk, select_rows, store_texts, unpack_texts
from hyperscale.data.rows import READERS, FileRows, Row, check_file
from hyperscale.data.tasks import Task
from hyperscale.errors import DataError
from hyperscale.logger import get_logger

_logger = get_logger(__name__)

_MOST_LABELS = 200
"""Every row scores every candidate, so a column with more values than this must be treated as free text."""


@dataclass(frozen=True)
class OpenSource:
    """Where the rows of a task are."""

    printed: str
    """Printable origin: `file:…`, `asset:…` or `hub:…`."""
    content: str
    """Identifies the rows: equal for equal files, wherever they are."""
    read: Callable[[], Mapping[Split, Iterable[Row]]]
    """Opens the rows of each split. Every iteration reads them again."""


@dataclass(frozen=True)
class TaskData:
    """A task's examples."""

    task: Task
    """The task. Its `labels` are filled in if they come from the data."""
    source: str
    """Printable origin: `file:…`, `asset:…` or `hub:…`."""
    digest: str
    """sha256 (hex) of all examples of all splits."""
    splits: Mapping[Split, Sequence[Example]]
    """`train`, `validation`, and `test` if the source has one."""


def load_task_data(
    task: Task, train_limit: int | None = None, validation_limit: int | None = None, test_limit: int | None = None
) -> TaskData:
    """Read a task's rows into memory and divide them into splits that share no text.

    If the source has no validation rows, a tenth of the training texts becomes the validation split. A text that
    occurs in two splits stays in the later one of train, validation, test. Limits count rows.

    Raises:
        DataError: a file, column or label is missing or wrong (with file and line), or a split has no rows.
    """
    source = open_source(task)
    rows = source.read()
    task = with_labels(task, rows)
    candidates = renderer(task).candidates
    limits: dict[Split, int | None] = {"train": train_limit, "validation": validation_limit, "test": test_limit}
    digest = hashlib.sha256()
    with TemporaryDirectory(prefix="hyperscale-") as scratch:
        stores = store_texts(
            f"task '{task.name}': {source.printed}",
            rows,
            Path(scratch),
            lambda chunks: map(partial(render_chunk, task), chunks),
        )
        splits = {
            split: [
                example
                for batch in hashed(split, stores[selection.origin].batches(selection.mask), digest)
                for example in unpack_texts(batch, candidates)
            ]
            for split, selection in select_rows(task.name, stores, limits).items()
        }
    return TaskData(task, source.printed, digest.hexdigest(), splits)


def open_source(task: Task, memory: Path | None = None) -> OpenSource:
    """Find a task's rows without reading them.

    Args:
        memory: a folder that remembers the digests of large files.

    Raises:
        DataError: a file is missing, or a data set cannot be reached.
    """
    match task.source:
        case FileSource() as source:
            files, printed = _files(source, task.name), f"file:{source.path or source.train}"
        case AssetSource(asset=asset, subset=subset):
            stored = open_dataset(asset, subset)
            files, printed = {split: stored[split] for split in SPLITS if split in stored}, f"asset:{asset}/{subset}"
        case HubSource(local_folder=Path() as folder):
            files, printed = _files(FileSource(path=str(folder)), task.name), f"file:{folder}"
        case HubSource() as source:
            named = _named_columns(task)
            return OpenSource(printable(source), hub_content(source), lambda: _labelled(open_hub(source, named), task))
    digests = {split: file_digest(check_file(path), memory) for split, path in files.items()}
    kinds = {split: path.suffix.lower() for split, path in files.items()}
    rows: Mapping[Split, Iterable[Row]] = {split: FileRows(path) for split, path in files.items()}
    return OpenSource(
        printed,
        f"{sorted(digests.items())} {sorted(kinds.items())}",
        lambda: _labelled(rows, task) if isinstance(task.source, HubSource) else rows,
    )


def _named_columns(task: Task) -> tuple[str, ...]:
    """Return the columns whose numbers stand for names: tags, and labels that the task file does not list."""
    if task.tagging is not None:
        return (task.tagging.tags,)
    return (task.label_column,) if task.label_column is not None and task.labels is None else ()


@dataclass(frozen=True)
class _Labelled:
    """Rows without those that a hub data set gives no label for."""

    rows: Iterable[Row]
    column: str
    is_classification: bool

    def __iter__(self) -> Iterator[Row]:
        num_dropped = 0
        for row in self.rows:
            if self.has_label(row) or not self.is_classification:  # -1 may be a real number of another task
                yield row
            else:
                num_dropped += 1
        if num_dropped:
            _logger.info("%d rows have no label in '%s' and are left out", num_dropped, self.column)

    def has_label(self, row: Row) -> bool:
        return row.values.get(self.column) not in (-1, "-1")


def _labelled(rows: Mapping[Split, Iterable[Row]], task: Task) -> Mapping[Split, Iterable[Row]]:
    """Leave out what a hub data set gives no label for: rows of a classification, and whole splits of any task."""
    column = task.label_column or templates.parse(task.target).columns[0]
    if "-1" in (task.labels or ()):
        return rows
    kept: dict[Split, Iterable[Row]] = {}
    for split, of_split in rows.items():
        labelled = _Labelled(of_split, column, task.label_column is not None)
        if any(map(labelled.has_label, of_split)) or next(iter(of_split), None) is None:
            kept[split] = labelled
        else:
            _logger.info("task %s: the %s split has no labels and is left out", task.name, split)
    return kept


def _files(source: FileSource, task: str) -> dict[Split, Path]:
    paths = source.model_dump(include={"path", *SPLITS}, exclude_none=True)
    for path in paths.values():
        if name := unset_variable(path):
            raise DataError(
                f"task '{task}': the environment variable {name}, used in its source {path}, is not set; "
                "set it to the folder that contains the rows"
            )
    if source.path is None:
        return {split: Path(paths[split]) for split in SPLITS if split in paths}
    folder = Path(source.path)
    if not folder.suffix and not folder.exists():
        raise DataError(f"task '{task}': there is no folder {folder}; it should hold train, validation and test files")
    if not folder.is_dir():
        return {"train": folder}
    files = {split: path for split in SPLITS if (path := _split_file(folder, split)) is not None}
    if "train" not in files:
        raise DataError(f"task '{task}': folder {folder} holds no train file ({', '.join(READERS)})")
    return files


def _split_file(folder: Path, split: Split) -> Path | None:
    return next((path for suffix in READERS if (path := folder / f"{split}{suffix}").is_file()), None)


def with_labels(task: Task, rows: Mapping[Split, Iterable[Row]]) -> Task:
    """Take the label words from the data if the task file lists none; this reads all rows.

    Raises:
        DataError: there are too few or too many different labels.
    """
    column = task.label_column
    if column is None or task.labels is not None:
        return task
    values = sorted({label_value(row, column, task.name) for of_split in rows.values() for row in of_split})
    if not values:
        return task
    remedy = "score it as text with metrics: [exact_match] and a target template, or list labels"
    if len(values) < 2:
        raise DataError(
            f"task '{task.name}': column '{task.label_column}' holds only one value, '{values[0]}'; {remedy}"
        )
    if len(values) > _MOST_LABELS:
        raise DataError(
            f"task '{task.name}': column '{task.label_column}' holds {len(values)} different values; {remedy}"
        )
    return task.model_copy(update={"labels": {value: value for value in values}})
