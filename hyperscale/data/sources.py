"""Opens a task's source and returns its examples by split, ready for tokenisation."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hyperscale.assets.datasets import open_dataset
from hyperscale.data.examples import Example, label_value, renderer
from hyperscale.data.hub import open_hub, printable
from hyperscale.data.rows import READERS, Row, read_rows
from hyperscale.data.splits import carve_validation, limit, without_texts_of
from hyperscale.data.tasks import SPLITS, AssetSource, FileSource, HubSource, Split, Task
from hyperscale.errors import DataError
from hyperscale.logger import get_logger

_logger = get_logger(__name__)

_MOST_LABELS = 200
"""Each candidate is scored for each row: more words than this are free text."""


@dataclass(frozen=True)
class TaskData:
    """A task's examples."""

    task: Task
    """The task, its `labels` filled in where they were taken from the data."""
    source: str
    """Printable origin: `file:…`, `asset:…` or `hub:…`."""
    digest: str
    """sha256 (hex) of all examples of all splits."""
    splits: Mapping[Split, Sequence[Example]]
    """`train`, `validation`, and `test` where the source has one."""


def load_task_data(
    task: Task, train_limit: int | None = None, validation_limit: int | None = None, test_limit: int | None = None
) -> TaskData:
    """Read a task's rows and divide them into splits that share no text.

    Without validation rows, a tenth of the training texts becomes the validation split. A text in two splits stays in
    the later of train, validation, test. Limits count rows.

    Raises:
        DataError: a file, column or label is missing or wrong (with file and line), or a split has no rows.
    """
    rows, source = _open(task)
    task = _with_labels(task, [row for split in rows.values() for row in split])
    render = renderer(task).example
    examples = {split: [render(row) for row in rows[split]] for split in SPLITS if split in rows}
    for split, found in examples.items():
        if not found:
            raise DataError(f"task '{task.name}': {source} has no rows for {split}")
    splits = _divide(task.name, examples)
    splits["train"] = limit(splits["train"], train_limit)
    splits["validation"] = limit(splits["validation"], validation_limit)
    if "test" in splits:
        splits["test"] = limit(splits["test"], test_limit)
    return TaskData(task, source, _digest(splits), splits)


def _open(task: Task) -> tuple[Mapping[Split, Sequence[Row]], str]:
    match task.source:
        case FileSource() as source:
            files, printed = _files(source, task.name), f"file:{source.path or source.train}"
        case AssetSource(asset=asset, subset=subset):
            stored = open_dataset(asset, subset)
            files, printed = {split: stored[split] for split in SPLITS if split in stored}, f"asset:{asset}/{subset}"
        case HubSource() as source:
            return open_hub(source, task.label_column, name_labels=task.labels is None), printable(source)
    return {split: list(read_rows(path)) for split, path in files.items()}, printed


def _files(source: FileSource, task: str) -> dict[Split, Path]:
    given = source.model_dump(include={"path", *SPLITS}, exclude_none=True)
    for path in given.values():
        if "${" in path:
            name = path.partition("${")[2].partition("}")[0]
            raise DataError(f"task '{task}': the environment variable {name}, used in its source {path}, is not set")
    if source.path is None:
        return {split: Path(given[split]) for split in SPLITS if split in given}
    folder = Path(source.path)
    if not folder.is_dir():
        return {"train": folder}
    found = {split: path for split in SPLITS if (path := _split_file(folder, split)) is not None}
    if "train" not in found:
        raise DataError(f"task '{task}': folder {folder} holds no train file ({', '.join(READERS)})")
    return found


def _split_file(folder: Path, split: Split) -> Path | None:
    return next((path for suffix in READERS if (path := folder / f"{split}{suffix}").is_file()), None)


def _with_labels(task: Task, rows: Sequence[Row]) -> Task:
    """Take the label words from the data where the task file lists none."""
    if task.label_column is None or task.labels is not None or not rows:
        return task
    found = sorted({label_value(row, task.label_column, task.name) for row in rows})
    remedy = "score it as text with metrics: [exact_match] and a target template, or list labels"
    if len(found) < 2:
        raise DataError(
            f"task '{task.name}': column '{task.label_column}' holds one value only, '{found[0]}'; {remedy}"
        )
    if len(found) > _MOST_LABELS:
        raise DataError(
            f"task '{task.name}': column '{task.label_column}' holds {len(found)} different values; {remedy}"
        )
    return task.model_copy(update={"labels": {value: value for value in found}})


def _divide(task: str, examples: Mapping[Split, Sequence[Example]]) -> dict[Split, list[Example]]:
    if "train" not in examples:
        raise DataError(f"task '{task}': there are no training rows, only {', '.join(examples)}")
    given, test = examples.get("validation", ()), list(examples.get("test", ()))
    train = without_texts_of(examples["train"], given, test)
    validation = without_texts_of(given, test)
    for split, left_out in (
        ("train", len(examples["train"]) - len(train)),
        ("validation", len(given) - len(validation)),
    ):
        if left_out:
            _logger.info("task %s: %d %s rows left out, a later split has their text", task, left_out, split)
    if not given:
        train, validation = carve_validation(train)
        _logger.info("task %s: %d validation rows carved from train", task, len(validation))
    splits: dict[Split, list[Example]] = {"train": train, "validation": validation}
    for split, left in splits.items():
        if not left:
            raise DataError(f"task '{task}': no {split} rows are left when no text may be in two splits; add rows")
    return splits | ({"test": test} if test else {})


def _digest(splits: Mapping[Split, Sequence[Example]]) -> str:
    digest = hashlib.sha256()
    for split, examples in splits.items():
        for example in examples:
            digest.update(json.dumps([split, example.source, example.target]).encode() + b"\n")
    return digest.hexdigest()
