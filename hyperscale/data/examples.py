"""Turns rows into examples: fills in the templates and replaces a label's value by its word."""

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from typing import Any, TypeVar

from hyperscale.data import templates
from hyperscale.data.conversations import Conversation, check_answered, read_conversation
from hyperscale.data.rows import Row
from hyperscale.data.tagging import WRITINGS, Tagging, Writing, read_tags, read_words
from hyperscale.data.tasks import Task
from hyperscale.data.templates import Template
from hyperscale.errors import DataError, nearest

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt and its answer. `candidates` holds every possible answer of a classification; else it is empty."""

    source: str
    target: str
    candidates: tuple[str, ...]
    content: bytes = field(default=b"", compare=False)
    """Digest of the letters and digits in the prompt's columns, in any order of columns. It is equal for two tasks
    that ask about the same texts, whatever their templates."""
    conversation: Conversation | None = None
    """The messages of a row of conversations. `source` is then what is before the last turn, as `role: text`."""


@dataclass(frozen=True)
class Renderer:
    """Turns rows of one task into prompts and examples. `renderer` creates it."""

    task: Task
    input: Template
    target: Template
    candidates: tuple[str, ...]

    def prompt(self, row: Row) -> str:
        """Return the prompt of a row. The row needs no answer. A conversation's prompt is `conversation(row).prompt`.

        Raises:
            DataError: a column is missing or holds no text.
        """
        return self.input.render(self._prompt_texts(row))

    def conversation(self, row: Row) -> Conversation | None:
        """Return the conversation of a row, whose last turn may be anyone's; None for a task of another kind.

        Raises:
            DataError: the row holds no conversation, or one of its messages is malformed.
        """
        settings = self.task.conversation
        return None if settings is None else read_conversation(row, settings, self.task.name, self.task.system)

    def read_answer(self, row: Row, answer: str) -> str:
        """Return a generated answer as its task reads it: for sequence labelling, the BIO tags of the row's words."""
        if self.task.tagging is None:
            return answer.strip()
        return " ".join(self._writing.tags(answer, self._words(row)))

    def example(self, row: Row) -> Example:
        """Return prompt and answer of a row.

        Raises:
            DataError: a column is missing or holds no text, the label is unknown, the answer is empty or not a number,
                words and tags do not match, or a conversation is malformed or does not end with the assistant.
        """
        conversation = self.conversation(row)
        if conversation is not None:
            return _example_of(conversation, self.task.name)
        target = self._target(row)
        if not target.strip():
            raise DataError(f"{row.where}: the answer of task '{self.task.name}' is empty")
        texts = self._prompt_texts(row)
        return Example(self.input.render(texts), target, self.candidates, _content(texts.values()))

    def _target(self, row: Row) -> str:
        if self.task.tagging is not None:
            words = self._words(row)
            return self._writing.answer(
                self._read(row, self._tagging.tags, "target", lambda tags: read_tags(tags, words))
            )
        if self.task.label_column is not None:
            return self._answer(self._word(row))
        texts = self._texts(row, self.target, "target")
        if self.task.round_to is not None:
            step = Decimal(str(self.task.round_to))
            texts = {column: _rounded(text, step, row, column) for column, text in texts.items()}
        return self.target.render(texts)

    def _word(self, row: Row) -> str:
        column, labels = str(self.task.label_column), self.task.labels or {}
        value = label_value(row, column, self.task.name)
        if value not in labels:
            raise DataError(f"{row.where}: unknown label '{value}' in column '{column}'; known: {', '.join(labels)}")
        return labels[value]

    def _answer(self, word: str) -> str:
        return self.target.render(dict.fromkeys(self.target.columns, word))

    def _prompt_texts(self, row: Row) -> dict[str, str]:
        if self.task.tagging is None:
            return self._texts(row, self.input, "input")
        columns = [column for column in self.input.columns if column != self._tagging.tokens]
        others = {column: self._read(row, column, "input", templates.text_of) for column in columns}
        return {self._tagging.tokens: self._writing.prompt(self._words(row)), **others}

    def _words(self, row: Row) -> tuple[str, ...]:
        return self._read(row, self._tagging.tokens, "input", read_words)

    def _texts(self, row: Row, template: Template, which: str) -> dict[str, str]:
        return {column: self._read(row, column, which, templates.text_of) for column in template.columns}

    def _read(self, row: Row, column: str, which: str, reader: Callable[[Any], T]) -> T:
        return _read(row, column, f"the {which} of task '{self.task.name}'", reader)

    @property
    def _tagging(self) -> Tagging:
        assert self.task.tagging is not None, "only sequence labelling has tagging"
        return self.task.tagging

    @property
    def _writing(self) -> Writing:
        if self._tagging.format is None:
            raise ValueError("tagging has no format; call task.written_for first")
        return WRITINGS[self._tagging.format]


def _example_of(conversation: Conversation, task: str) -> Example:
    check_answered(conversation, task)
    before = str(conversation.prompt)
    return Example(before, conversation.answer, (), _content([before]), conversation)


def renderer(task: Task) -> Renderer:
    """Prepare a task's templates.

    A classification needs its `labels`, which `TaskData.task` has. Sequence labelling needs its format, which
    `Task.written_for` sets.
    """
    target = templates.parse(task.target)
    words = dict.fromkeys(task.labels.values()) if task.labels and task.label_column else {}
    candidates = tuple(target.render(dict.fromkeys(target.columns, word)) for word in words)
    return Renderer(task, templates.parse(task.input), target, candidates)


def label_value(row: Row, column: str, task: str) -> str:
    """Return a row's label as the key of `labels`; 1.0 and 1 are the same label."""
    text = _read(row, column, f"the label of task '{task}'", templates.text_of)
    value = row.values[column]
    return str(int(value)) if isinstance(value, float) and value.is_integer() else text


def _read(row: Row, column: str, origin: str, reader: Callable[[Any], T]) -> T:
    if column not in row.values:
        raise DataError(_missing_column(row.values, column, f"{row.where}: {origin}"))
    try:
        return reader(row.values[column])
    except ValueError as error:
        raise DataError(f"{row.where}: column '{column}', used by {origin}, {error}") from error


def _rounded(text: str, step: Decimal, row: Row, column: str) -> str:
    try:
        return str((Decimal(text) / step).quantize(Decimal(1)) * step)
    except InvalidOperation as error:
        raise DataError(f"{row.where}: column '{column}' holds '{text}', which is not a number to round") from error


def _content(texts: Iterable[str]) -> bytes:
    letters = sorted(re.sub(r"[\W_]+", "", text.casefold()) for text in texts)
    return hashlib.blake2b("\n".join(letters).encode(), digest_size=12).digest()


def _missing_column(values: Mapping[str, Any], column: str, start: str) -> str:
    columns = ", ".join(values) or "none"
    return f"{start} needs column '{column}', which the row does not have.{nearest(column, values)} Columns: {columns}"
