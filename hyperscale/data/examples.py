"""A row becomes an example: templates filled in, the label's value replaced by its word."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hyperscale.data import templates
from hyperscale.data.rows import Row
from hyperscale.data.tasks import Task
from hyperscale.data.templates import Template
from hyperscale.errors import DataError, nearest


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt and its answer; `candidates` holds every possible answer of a classification, else nothing."""

    source: str
    target: str
    candidates: tuple[str, ...]


@dataclass(frozen=True)
class Renderer:
    """Turns rows of one task into prompts and examples. Make it with `renderer`."""

    task: Task
    input: Template
    target: Template
    candidates: tuple[str, ...]

    def prompt(self, row: Row) -> str:
        """Return the prompt of a row, which needs no answer.

        Raises:
            DataError: a column is missing or holds no text.
        """
        return self.input.render(self._texts(row, self.input, "input"))

    def example(self, row: Row) -> Example:
        """Return prompt and answer of a row.

        Raises:
            DataError: a column is missing or holds no text, the label is unknown, the answer is empty.
        """
        if self.task.label_column is None:
            target = self.target.render(self._texts(row, self.target, "target"))
        else:
            target = self._answer(self._word(row))
        if not target.strip():
            raise DataError(f"{row.where}: the answer of task '{self.task.name}' is empty")
        return Example(self.prompt(row), target, self.candidates)

    def _word(self, row: Row) -> str:
        column, labels = str(self.task.label_column), self.task.labels or {}
        value = label_value(row, column, self.task.name)
        if value not in labels:
            raise DataError(f"{row.where}: unknown label '{value}' in column '{column}'; known: {', '.join(labels)}")
        return labels[value]

    def _answer(self, word: str) -> str:
        return self.target.render(dict.fromkeys(self.target.columns, word))

    def _texts(self, row: Row, template: Template, which: str) -> dict[str, str]:
        origin = f"the {which} of task '{self.task.name}'"
        return {column: _text(row, column, origin) for column in template.columns}


def renderer(task: Task) -> Renderer:
    """Prepare a task's templates; a classification must have its `labels`, as `TaskData.task` has."""
    target = templates.parse(task.target)
    words = dict.fromkeys(task.labels.values()) if task.labels and task.label_column else {}
    candidates = tuple(target.render(dict.fromkeys(target.columns, word)) for word in words)
    return Renderer(task, templates.parse(task.input), target, candidates)


def label_value(row: Row, column: str, task: str) -> str:
    """Return a row's label as the text that `labels` is looked up with; 1.0 and 1 are the same label."""
    text = _text(row, column, f"the label of task '{task}'")
    value = row.values[column]
    return str(int(value)) if isinstance(value, float) and value.is_integer() else text


def _text(row: Row, column: str, origin: str) -> str:
    if column not in row.values:
        raise DataError(_missing_column(row.values, column, f"{row.where}: {origin}"))
    try:
        return templates.text_of(row.values[column])
    except ValueError as error:
        raise DataError(f"{row.where}: column '{column}', used by {origin}, {error}") from error


def _missing_column(values: Mapping[str, Any], column: str, start: str) -> str:
    there = ", ".join(values) or "none"
    return f"{start} needs column '{column}', which the row does not have.{nearest(column, values)} There are: {there}"
