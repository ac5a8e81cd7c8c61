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
"""Every row scores every candidate, so a column with more values than this must be treated as free text."""


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
    """Read a task's rows and divide them into splits that share no text.

    If the source has no validation rows, a tenth of the training texts becomes the validation split. A text that
    occurs in two splits stays in the later one of train, validation, test. Limits count rows.

    Raises:
        DataError: a file, column or label is missing or wrong (with file and line), or a split has no rows.
    """
    rows, source = _open(task)
    task = _with_labels(task, [row for split in rows.values() for row in split])
    render = renderer(task).example
    examples = {split: [render(row) for row in rows[split]] for split in SPLITS if split in rows}
    for split, rendered in examples.items():
        if not rendered:
            raise DataError(f"task '{task.name}': {source} has no rows for {split}")
    splits = _divide(task.name, examples)
    splits["train"] = limit(splits["train"], train_limit)
    splits["validation"] = limit(splits["validation"], validation_limit)
    if "test" in splits:
        splits["test"] = limit(splits["test"], test_limit)
    return TaskData(task, source, _digest(splits), splits)


def without_training_texts(data: TaskData, scored: Collection[bytes]) -> TaskData:
    """Return the task without the training rows whose texts have a digest in `scored`.

    Raises:
        DataError: no training rows are left.
    """
    kept = [example for example in data.splits["train"] if example.content not in scored]
    left_out = len(data.splits["train"]) - len(kept)
    if not left_out:
        return data
    if not kept:
        raise DataError(f"task '{data.task.name}': no training rows are left; other tasks score all of their texts")
    _logger.info("task %s: %d training rows left out because another task scores their texts", data.task.name, left_out)
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
    """Leave out what a hub data set gives no label for: rows of a classification, and whole splits of any task."""
    column = task.label_column or templates.parse(task.target).columns[0]
    if "-1" in (task.labels or ()):
        return rows
    kept: dict[Split, Sequence[Row]] = {}
    for split, all_rows in rows.items():
        labelled = [row for row in all_rows if row.values.get(column) not in (-1, "-1")]
        if not labelled and all_rows:
            _logger.info("task %s: the %s split has no labels and is left out", task.name, split)
        elif task.label_column is None:
            kept[split] = all_rows  # -1 may be a real number here
        else:
            kept[split] = labelled
            if len(labelled) < len(all_rows):
                num_dropped = len(all_rows) - len(labelled)
                _logger.info("task %s: %d %s rows have no label and are left out", task.name, num_dropped, split)
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


def _with_labels(task: Task, rows: Sequence[Row]) -> Task:
    """Take the label words from the data if the task file lists none."""
    if task.label_column is None or task.labels is not None or not rows:
        return task
    values = sorted({label_value(row, task.label_column, task.name) for row in rows})
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


def _divide(task: str, examples: Mapping[Split, Sequence[Example]]) -> dict[Split, list[Example]]:
    if "train" not in examples:
        raise DataError(f"task '{task}': there are no training rows, only {', '.join(examples)}")
    own_validation, test = examples.get("validation", ()), list(examples.get("test", ()))
    train = without_texts_of(examples["train"], own_validation, test)
    validation = without_texts_of(own_validation, test)
    for split, left_out in (
        ("train", len(examples["train"]) - len(train)),
        ("validation", len(own_validation) - len(validation)),
    ):
        if left_out:
            _logger.info("task %s: %d %s rows left out because a later split has their texts", task, left_out, split)
    if not own_validation:
        train, validation = carve_validation(train)
        _logger.info("task %s: %d validation rows carved from the training rows", task, len(validation))
    splits: dict[Split, list[Example]] = {"train": train, "validation": validation}
    for split, left in splits.items():
        if not left:
            raise DataError(f"task '{task}': no {split} rows are left once every text is in one split only; add rows")
    return splits | ({"test": test} if test else {})


def _digest(splits: Mapping[Split, Sequence[Example]]) -> str:
    digest = hashlib.sha256()
    for split, examples in splits.items():
        for example in examples:
            digest.update(json.dumps([split, example.source, example.target]).encode() + b"\n")
    return digest.hexdigest()
