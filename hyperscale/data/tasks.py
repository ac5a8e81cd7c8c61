"""Declarative tasks: one YAML file says where the rows are, how they become text, and how answers are scored."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator

from hyperscale.config.problems import describe
from hyperscale.config.section import Section
from hyperscale.config.yaml_file import read_mapping
from hyperscale.data import templates
from hyperscale.errors import DataError, nearest

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
MetricName = Literal["accuracy", "exact_match", "f1", "macro_f1", "mcc", "pearson", "spearman", "span_f1"]
_LABEL_METRICS = {"accuracy", "f1", "macro_f1", "mcc"}
_PACKAGED = Path(__file__).parent / "tasks"
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


class FileSource(Section):
    """JSONL, CSV, TSV or Parquet files; paths are relative to the task file, `~` and `${VARIABLE}` are expanded."""

    kind: Literal["file"] = "file"
    path: str | None = None
    """A folder with train, validation and test files, or one file of training rows."""
    train: str | None = None
    validation: str | None = None
    test: str | None = None

    @model_validator(mode="after")
    def _one_way_to_name_the_files(self) -> Self:
        if self.path is None and self.train is None:
            raise ValueError("name the rows: path (a folder, or a file of training rows) or train, validation, test")
        if self.path is not None and (self.train or self.validation or self.test):
            raise ValueError("path and train, validation, test exclude each other")
        return self


class AssetSource(Section):
    """A data set that the package fetches by its pinned digest."""

    kind: Literal["asset"] = "asset"
    asset: str
    subset: str


class HubSource(Section):
    """A data set of the Hugging Face hub, or a folder that `datasets.load_dataset` understands."""

    kind: Literal["hub"] = "hub"
    path: str
    name: str | None = None
    """The configuration, such as `sst2` of `nyu-mll/glue`."""
    revision: str | None = None
    splits: dict[Split, str] | None = None
    """Our split -> its name there; by default those of the same names that exist."""


def _with_kind(source: Any) -> Any:
    """Let short forms stand for `kind: file` and `kind: asset`."""
    if isinstance(source, str):
        return {"kind": "file", "path": source}
    if isinstance(source, dict) and "kind" not in source:
        return {"kind": "asset" if "asset" in source else "file", **source}
    return source


Source = Annotated[FileSource | AssetSource | HubSource, Field(discriminator="kind"), BeforeValidator(_with_kind)]


class Task(Section):
    """One task. With `label_column` it is a classification whose candidate answers are scored, else free text."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """Default: the file's name. It becomes part of metric names and folders."""
    version: str = Field(default="1", coerce_numbers_to_str=True)
    description: str = ""
    source: Source
    input: str
    """Template of the prompt."""
    target: str
    """Template of the answer; by default the label alone."""
    labels: dict[str, str] | None = None
    """Row value -> word the model writes; None with a `label_column`: the values found in the data."""
    label_column: str | None = None
    positive_label: str | None = None
    """The word whose F1 `f1` reports; by default the last of `labels`."""
    metrics: tuple[MetricName, ...] = Field(min_length=1)
    """The first is the main one; by default accuracy for a classification, else exact_match."""
    chat: bool = False
    """Put the prompt through the tokenizer's chat template."""
    system: str | None = None
    max_new_tokens: int = Field(default=32, ge=1)
    not_with: tuple[str, ...] = ()
    """Names of tasks that must not be in one run with this one, as where one holds the other's validation rows.
    The description says why."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, data: Any) -> Any:
        return _with_defaults(data) if isinstance(data, dict) else data

    @field_validator("input", "target")
    @classmethod
    def _is_a_template(cls, text: str) -> str:
        if not templates.parse(text).names:
            raise ValueError("the template names no column; write it as '{column}'")
        return text

    @field_validator("labels", mode="before")
    @classmethod
    def _label_words(cls, labels: Any) -> Any:
        if not isinstance(labels, dict):
            return labels
        if any(isinstance(item, bool) for pair in labels.items() for item in pair):
            raise ValueError("YAML reads yes, no, on, off, true and false as truth values; put such words in quotes")
        words = {str(value): str(word) if isinstance(word, int | float) else word for value, word in labels.items()}
        if len({str(word) for word in words.values()}) < 2:
            raise ValueError("a classification needs at least two different words")
        return words

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        problems = []
        if self.label_column is not None:
            others = set(templates.parse(self.target).columns) - {self.label_column, "label"}
            if others:
                problems.append(f"target of a classification holds only the label, not {', '.join(sorted(others))}")
        if self.positive_label is not None and self.labels and self.positive_label not in self.labels.values():
            words = ", ".join(self.labels.values())
            problems.append(f"positive_label '{self.positive_label}' is not one of the words of labels: {words}")
        if "f1" in self.metrics and self.positive_label is None:
            problems.append("metric f1 needs positive_label, the word whose F1 is meant; or use macro_f1")
        if self.system is not None and not self.chat:
            problems.append("system is only used with chat: true")
        if len(set(self.metrics)) != len(self.metrics):
            problems.append("metrics lists a name more than once")
        if problems:
            raise ValueError("; ".join(problems))
        return self


def _with_defaults(data: dict[Any, Any]) -> dict[Any, Any]:
    """Add what follows from the other keys: label column, target, metrics, positive label."""
    filled = dict(data)
    metrics, target, labels = filled.get("metrics"), filled.get("target"), filled.get("labels")
    if isinstance(metrics, str):
        filled["metrics"] = metrics = [metrics]
    scores_labels = isinstance(metrics, list | tuple) and bool(_LABEL_METRICS.intersection(map(str, metrics)))
    if filled.get("label_column") is None and (labels or scores_labels):
        filled["label_column"] = _only_column(target) or "label"
    column = filled.get("label_column")
    if target is None and column is not None:
        filled["target"] = f"{{{column}}}"
    if metrics is None:
        filled["metrics"] = ["accuracy" if column is not None else "exact_match"]
    if filled.get("positive_label") is None and isinstance(labels, dict) and labels:
        filled["positive_label"] = str(list(labels.values())[-1])
    return filled


def _only_column(target: Any) -> str | None:
    try:
        columns = templates.parse(target).columns if isinstance(target, str) else ()
    except ValueError:
        return None  # reported by the field's own check
    return columns[0] if len(columns) == 1 else None


def load_task(name_or_path: str, folders: Sequence[str | Path] = ()) -> Task:
    """Read one task: a path of a YAML file, or a name looked up in `folders`, then among the packaged tasks.

    Raises:
        DataError: no such task (with the nearest name), or its file is wrong (one line for each problem).
    """
    path = Path(os.path.expandvars(name_or_path)).expanduser()
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        if not path.is_file():
            raise DataError(f"task file '{name_or_path}' does not exist")
        return _read_task(path)
    files = _task_files(folders)
    if name_or_path in files:
        return _read_task(files[name_or_path])
    named = {_given_name(file): file for file in files.values()}
    if name_or_path in named:
        return _read_task(named[name_or_path])
    known = ", ".join(sorted(files)) or "none"
    raise DataError(
        f"unknown task '{name_or_path}'.{nearest(name_or_path, [*files, *filter(None, named)])} Known: {known}"
    )


def list_tasks(folders: Sequence[str | Path] = ()) -> list[Task]:
    """Return every task in `folders` and in the package, by name; a file in `folders` hides a packaged one."""
    files = [path for path in _task_files(folders).values() if not _is_something_else(path)]
    return sorted(map(_read_task, files), key=lambda task: task.name)


def _is_something_else(path: Path) -> bool:
    """Whether a YAML file has neither a task's source nor its input, as a recipe that lies beside tasks."""
    return not {"source", "input"}.intersection(read_mapping(path, "a task", DataError))


def _task_files(folders: Sequence[str | Path]) -> dict[str, Path]:
    """Return stem -> file; earlier folders win."""
    files: dict[str, Path] = {}
    for folder in [*map(Path, folders), _PACKAGED]:
        expanded = folder.expanduser()
        if not expanded.is_dir():
            raise DataError(f"task folder '{folder}' does not exist")
        for path in sorted([*expanded.glob("*.yaml"), *expanded.glob("*.yml")]):
            files.setdefault(path.stem, path)
    return files


def _given_name(path: Path) -> str | None:
    try:
        raw = read_mapping(path, "a task", DataError)
    except DataError:
        return None  # a broken neighbour does not stop the search for another task
    return str(raw["name"]) if "name" in raw else None


def _read_task(path: Path) -> Task:
    raw = {"name": path.stem, **read_mapping(path, "a task", DataError)}
    try:
        task = Task.model_validate(raw)
    except ValidationError as error:
        raise DataError("\n".join(describe(error, Task, str(path)))) from error
    if not isinstance(task.source, FileSource):
        return task
    folder = path.absolute().parent
    given = task.source.model_dump(exclude={"kind"}, exclude_none=True)
    source = FileSource(**{key: _absolute(value, folder) for key, value in given.items()})
    return task.model_copy(update={"source": source})


def _absolute(path: str, folder: Path) -> str:
    expanded = _VARIABLE.sub(lambda match: os.environ.get(match[1], match[0]), path)
    if _VARIABLE.search(expanded):
        return expanded  # a task can be listed without the variable; opening its rows reports it
    return os.path.normpath(folder / Path(expanded).expanduser())
