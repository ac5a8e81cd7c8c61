"""Opens a task's source and returns its examples by split, ready for tokenisation."""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hyperscale.assets.datasets import open_dataset
from hyperscale.data import templates
from hyperscale.data.examples import Example, label_value, renderer
from hyperscale.data.hub import open_hub, printable
from hyperscale.data.origins import SPLITS, AssetSource, FileSource, HubSource, Split, unset_variable
from hyperscale.data.rows import READERS, Row, read_rows
from hyperscale.data.splits import carve_validation, limit, without_texts_of
from hyperscale.data.tasks import Task
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


def without_training_texts(data: TaskData, taken: Collection[bytes]) -> TaskData:
    """Return the task without the training rows that ask about texts of which `taken` holds the digests.

    Raises:
        DataError: no training rows are left.
    """
    kept = [example for example in data.splits["train"] if example.content not in taken]
    left_out = len(data.splits["train"]) - len(kept)
    if not left_out:
        return data
    if not kept:
        raise DataError(f"task '{data.task.name}': no train rows are left without the texts that other tasks score")
    _logger.info("task %s: %d train rows left out, another task scores their texts", data.task.name, left_out)
    splits = {**data.splits, "train": kept}
    return replace(data, digest=_digest(splits), splits=splits)


def _open(task: Task) -> tuple[Mapping[Split, Sequence[Row]], str]:
    match task.source:
        case FileSource() as source:
            files, printed = _files(source, task.name), f"file:{source.path or source.train}"
        case AssetSource(asset=asset, subset=subset):
            stored = open_dataset(asset, subset)
            files, printed = {split: stored[split] for split in SPLITS if split in stored}, f"asset:{asset}/{subset}"
        case HubSource(local_folder=Path() as folder):
            files, printed = _files(FileSource(path=str(folder)), task.name), f"file:{folder}"
        case HubSource() as source:
            return _labelled(open_hub(source, _named_columns(task)), task), printable(source)
    rows = {split: list(read_rows(path)) for split, path in files.items()}
    return _labelled(rows, task) if isinstance(task.source, HubSource) else rows, printed


def _named_columns(task: Task) -> tuple[str, ...]:
    """Return the columns whose numbers stand for names: tags, and labels that the task file does not list."""
    if task.tagging is not None:
        return (task.tagging.tags,)
    return (task.label_column,) if task.label_column is not None and task.labels is None else ()


def _labelled(rows: Mapping[Split, Sequence[Row]], task: Task) -> Mapping[Split, Sequence[Row]]:
    """Leave out what a hub's data set has no label for: single rows of a classification, and hidden splits of any."""
    column = task.label_column or templates.parse(task.target).columns[0]
    if "-1" in (task.labels or ()):
        return rows
    found: dict[Split, Sequence[Row]] = {}
    for split, of_split in rows.items():
        kept = [row for row in of_split if row.values.get(column) not in (-1, "-1")]
        if not kept and of_split:
            _logger.info("task %s: the %s split has no labels and is left out", task.name, split)
        elif task.label_column is None:
            found[split] = of_split  # numbers may well be -1
        else:
            found[split] = kept
            if len(kept) < len(of_split):
                _logger.info("task %s: %d %s rows have no label", task.name, len(of_split) - len(kept), split)
    return found


def _files(source: FileSource, task: str) -> dict[Split, Path]:
    given = source.model_dump(include={"path", *SPLITS}, exclude_none=True)
    for path in given.values():
        if name := unset_variable(path):
            raise DataError(
                f"task '{task}': the environment variable {name}, used in its source {path}, is not set; "
                "set it to the folder that holds these rows"
            )
    if source.path is None:
        return {split: Path(given[split]) for split in SPLITS if split in given}
    folder = Path(source.path)
    if not folder.suffix and not folder.exists():
        raise DataError(f"task '{task}': there is no folder {folder}; it would hold train, validation and test files")
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
