"""Declarative tasks. One YAML file says where the rows are, how they become text, and how answers are scored."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, ValidationError, ValidationInfo, field_validator, model_validator

from hyperscale.config.problems import describe
from hyperscale.config.section import Section
from hyperscale.config.yaml_file import read_file, read_mapping
from hyperscale.data import templates
from hyperscale.data.conversations import ConversationSettings
from hyperscale.data.metric_table import check_metric
from hyperscale.data.origins import Source, located
from hyperscale.data.tagging import Tagging
from hyperscale.errors import DataError, nearest

_IS_FILE = {"is_file": True}


def _check_in_files(name: str, info: ValidationInfo) -> str:
    """Check a metric's name in a task file. A bundle is served without the packages that scored its task."""
    return check_metric(name) if info.context == _IS_FILE else name


MetricName = Annotated[str, AfterValidator(_check_in_files)]
_LABEL_METRICS = {"accuracy", "f1", "macro_f1", "mcc"}
_NUMBER_METRICS = {"pearson", "spearman"}
_TAGGING_TOKENS = 256
"""Enough for a tag and its marker for each word of a long sentence."""
_TURN_TOKENS = 256
_CONVERSATION_TEMPLATE = "{messages}"
_PACKAGED = Path(__file__).parent / "tasks"


class Task(Section):
    """One task: a classification if it has a `label_column` (its candidate answers are scored), sequence labelling if
    it has `tagging`, conversations if it has `conversation`, else free text.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """By default the file's name. It becomes part of metric names and folder names."""
    version: str = Field(default="1", coerce_numbers_to_str=True)
    description: str = ""
    source: Source
    input: str
    """Template of the prompt."""
    target: str
    """Template of the answer; by default the label alone."""
    labels: dict[str, str] | None = None
    """Row value -> word that the model writes. None with a `label_column` = the values in the data are the words."""
    label_column: str | None = None
    positive_label: str | None = None
    """The word whose F1 `f1` reports; by default the last of `labels`."""
    tagging: Tagging | None = None
    """Makes the task sequence labelling. In `input`, the column of the words stands for the whole written sentence,
    and by default `input` is that column alone."""
    conversation: ConversationSettings | None = None
    """Makes each row a conversation: `conversation: true`, or its columns. `input` and `target` are left out. Every
    assistant turn is trained; the last one is the answer that is scored."""
    round_to: float | None = Field(default=None, gt=0)
    """The answer is a number and is written as the nearest multiple of this: 0.2 for STS-B, as in T5."""
    metrics: tuple[MetricName, ...] = Field(min_length=1)
    """The first is the main one; by default accuracy for a classification, span_f1 for tagging, token_f1 for
    conversations, else exact_match."""
    chat: bool = False
    """Put the prompt through the tokenizer's chat template."""
    system: str | None = None
    """The system message of a chat; of conversations that have none."""
    max_new_tokens: int = Field(default=32, ge=1)
    """Largest length of a generated answer; by default 32, and 256 for tagging and conversations."""
    not_with: tuple[str, ...] = ()
    """Names of tasks that must not be in one run with this one, for example because one contains the other's
    validation rows. The description gives the reason."""
    shares_texts_with: tuple[str, ...] = ()
    """Names of tasks that were made from some of the same texts. In a run with them, this task leaves out training
    rows whose texts are in their validation or test rows."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, data: Any) -> Any:
        return _with_defaults(data) if isinstance(data, dict) else data

    @field_validator("conversation", mode="before")
    @classmethod
    def _conversation_columns(cls, value: Any) -> Any:
        return {True: {}, False: None}[value] if isinstance(value, bool) else value

    @field_validator("input", "target")
    @classmethod
    def _is_a_template(cls, text: str) -> str:
        if not templates.parse(text).names:
            raise ValueError("the template names no column; write one as '{column}'")
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
                problems.append(f"target of a classification may hold only the label, not {', '.join(sorted(others))}")
        if self.positive_label is not None and self.labels and self.positive_label not in self.labels.values():
            words = ", ".join(self.labels.values())
            problems.append(f"positive_label '{self.positive_label}' is not one of the words of labels: {words}")
        if "f1" in self.metrics and self.positive_label is None:
            problems.append("metric f1 needs positive_label, the word whose F1 it reports; or use macro_f1")
        if self.tagging is not None:
            problems += _tagging_problems(self)
        if self.conversation is not None:
            problems += _conversation_problems(self)
        if self.round_to is not None and (self.label_column is not None or self.tagging is not None):
            problems.append("round_to is for answers that are numbers, not for labels or tagging")
        if self.system is not None and not self.chat and self.conversation is None:
            problems.append("system is only used with chat: true or conversation")
        if len(set(self.metrics)) != len(self.metrics):
            problems.append("metrics lists a name more than once")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def kind(self) -> Literal["classification", "tagging", "conversation", "number", "text"]:
        """The kind of its answers."""
        if self.label_column is not None:
            return "classification"
        if self.tagging is not None:
            return "tagging"
        if self.conversation is not None:
            return "conversation"
        return "number" if self.round_to is not None or self.metrics[0] in _NUMBER_METRICS else "text"

    def written_for(self, is_encoder_decoder: bool) -> Self:
        """Return the task for a family of backbones: tagging gets its format, and any other task stays as it is."""
        if self.tagging is None or self.tagging.format is not None:
            return self
        tagging = self.tagging.model_copy(update={"format": "sentinels" if is_encoder_decoder else "lines"})
        return self.model_copy(update={"tagging": tagging})


def _tagging_problems(task: Task) -> list[str]:
    assert task.tagging is not None
    words, tags, problems = task.tagging.tokens, task.tagging.tags, []
    if task.label_column is not None:
        problems.append("tagging and labels exclude each other")
    elif templates.parse(task.target) != templates.parse(f"{{{tags}}}"):
        problems.append(f"target of tagging must be the tags alone, '{{{tags}}}'; leave it out")
    if words not in templates.parse(task.input).columns:
        problems.append(f"input must hold the words, '{{{words}}}'; leave it out for the sentence alone")
    return problems


def _conversation_problems(task: Task) -> list[str]:
    problems = []
    if task.label_column is not None or task.tagging is not None or task.round_to is not None:
        problems.append("conversation excludes labels, tagging and round_to")
    if {task.input, task.target} != {_CONVERSATION_TEMPLATE}:
        problems.append("conversation takes its texts from the messages; leave input and target out")
    return problems


def _with_defaults(data: dict[Any, Any]) -> dict[Any, Any]:
    """Add the defaults that follow from the written keys; a key with a value keeps it."""
    metrics = data.get("metrics")
    written = {**data, "metrics": [metrics]} if isinstance(metrics, str) else data
    defaults = {
        "metrics": ["exact_match"],
        **_tagging_defaults(written.get("tagging")),
        **_conversation_defaults(written.get("conversation")),
        **_classification_defaults(written),
    }
    return {**written, **{key: value for key, value in defaults.items() if written.get(key) is None}}


def _tagging_defaults(tagging: Any) -> dict[str, Any]:
    columns = tagging.model_dump() if isinstance(tagging, Tagging) else tagging
    if not isinstance(columns, dict):
        return {}
    return {
        "input": f"{{{columns.get('tokens', 'tokens')}}}",
        "target": f"{{{columns.get('tags', 'tags')}}}",
        "metrics": ["span_f1"],
        "max_new_tokens": _TAGGING_TOKENS,
    }


def _conversation_defaults(conversation: Any) -> dict[str, Any]:
    if conversation is None or conversation is False:
        return {}
    templates_of_texts = dict.fromkeys(("input", "target"), _CONVERSATION_TEMPLATE)
    return {**templates_of_texts, "metrics": ["token_f1"], "max_new_tokens": _TURN_TOKENS}


def _classification_defaults(data: dict[Any, Any]) -> dict[str, Any]:
    """Return the defaults of a task that has a label column, labels or a metric of labels; {} for any other."""
    metrics, labels, column = data.get("metrics"), data.get("labels"), data.get("label_column")
    scores_labels = isinstance(metrics, list | tuple) and bool(_LABEL_METRICS.intersection(map(str, metrics)))
    if column is None and (labels or scores_labels):
        column = _only_column(data.get("target")) or "label"
    if column is None:
        return {}
    last_word = str(list(labels.values())[-1]) if isinstance(labels, dict) and labels else None
    return {
        "label_column": column,
        "target": f"{{{column}}}",
        "metrics": ["accuracy"],
        "positive_label": last_word,
    }


def _only_column(target: Any) -> str | None:
    try:
        columns = templates.parse(target).columns if isinstance(target, str) else ()
    except ValueError:
        return None  # reported by the field's own check
    return columns[0] if len(columns) == 1 else None


def load_task(name_or_path: str, folders: Sequence[str | Path] = ()) -> Task:
    """Read one task: a path of a YAML file, or a name looked up in `folders`, then among the packaged tasks.

    Raises:
        DataError: there is no such task (with the nearest name), or its file is wrong (one line for each problem).
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
    """Return every task in `folders` and in the package, sorted by name; a file in `folders` hides a packaged one."""
    files = [path for path in _task_files(folders).values() if _is_task_file(path)]
    return sorted(map(_read_task, files), key=lambda task: task.name)


def _is_task_file(path: Path) -> bool:
    """Whether a YAML file has a task's source or input; a recipe in the same folder has neither."""
    return not {"source", "input"}.isdisjoint(read_mapping(path, "a task", DataError))


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
        return None  # a broken file must not stop the search for another task
    return str(raw["name"]) if "name" in raw else None


def _read_task(path: Path) -> Task:
    file = read_file(path, "a task", DataError)
    try:
        task = Task.model_validate({"name": path.stem, **file.values}, context=_IS_FILE)
    except ValidationError as error:
        raise DataError("\n".join(describe(error, Task, file.where))) from error
    return task.model_copy(update={"source": located(task.source, path.absolute().parent)})
