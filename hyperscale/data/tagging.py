"""Sequence labelling as text: words and one BIO tag for each, written for a model and read back from its answer.

Tags are written by their type alone: `city` begins a span (B-city), `I` continues the span before it, `O` is outside.

`sentinels`, for encoder-decoders (SentT′, HyperLoader, arXiv 2407.01411):
    <extra_id_0> to <extra_id_1> new <extra_id_2> york <extra_id_3>
    <extra_id_0> O <extra_id_1> city <extra_id_2> I <extra_id_3>
`lines`, for decoder-only models, repeats every word before its tag, as the files of the CoNLL tasks do:
    to new york⏎Tags:
    to O⏎new city⏎york I
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any, Literal, Protocol

from hyperscale.config.section import Section

TagFormat = Literal["sentinels", "lines"]

_SENTINEL = re.compile(r"<extra_id_(\d+)>")
_TAG = re.compile(r"O|[BI]-\S+")


class Tagging(Section):
    """The columns of a sequence-labelling task and the format of its text."""

    tokens: str = "tokens"
    """Column of the words: a list, or text with spaces between them."""
    tags: str = "tags"
    """Column of the tags, one for each word: `O`, `B-type`, `I-type`."""
    format: TagFormat | None = None
    """None: `sentinels` for an encoder-decoder, `lines` for a decoder-only model."""


@dataclass(frozen=True, slots=True)
class Tagged:
    """The words of a sentence and a BIO tag for each. Words read back from `sentinels` are empty strings."""

    words: tuple[str, ...]
    tags: tuple[str, ...]


class Writing(Protocol):
    """One way to write sentences and tags as text."""

    def prompt(self, words: Sequence[str]) -> str: ...

    def answer(self, sentence: Tagged) -> str: ...

    def reference(self, answer: str) -> Tagged:
        """Return the sentence that `answer` wrote."""
        ...

    def tags(self, answer: str, words: Sequence[str]) -> tuple[str, ...]:
        """Return the BIO tag that a generated answer gives each word; `O` for a word that it does not mention."""
        ...


class _Sentinels:
    def prompt(self, words: Sequence[str]) -> str:
        return self._between(words)

    def answer(self, sentence: Tagged) -> str:
        return self._between(_types(sentence.tags))

    def reference(self, answer: str) -> Tagged:
        words = ("",) * (len(_SENTINEL.findall(answer)) - 1)
        return Tagged(words, self.tags(answer, words))

    def tags(self, answer: str, words: Sequence[str]) -> tuple[str, ...]:
        _, *pieces = _SENTINEL.split(answer)
        types: dict[int, str] = {}
        for number, text in zip(pieces[::2], pieces[1::2], strict=True):
            types.setdefault(int(number), text)  # where a model repeats itself, its first answer counts
        return _bio([types.get(place, "") for place in range(len(words))])

    def _between(self, texts: Sequence[str]) -> str:
        return " ".join([*(f"<extra_id_{place}> {text}" for place, text in enumerate(texts)), sentinel(len(texts))])


class _Lines:
    def prompt(self, words: Sequence[str]) -> str:
        return f"{' '.join(words)}\nTags:"

    def answer(self, sentence: Tagged) -> str:
        return "\n".join(map(" ".join, zip(sentence.words, _types(sentence.tags), strict=True)))

    def reference(self, answer: str) -> Tagged:
        words, types = self._read(answer)
        return Tagged(tuple(words), _bio(types))

    def tags(self, answer: str, words: Sequence[str]) -> tuple[str, ...]:
        answered_words, answered_types = self._read(answer)
        types = [""] * len(words)
        # A word that is missing, doubled or misspelt must not shift the tags of the others.
        matcher = SequenceMatcher(None, words, answered_words, autojunk=False)
        for start, answered_start, size in matcher.get_matching_blocks():
            types[start : start + size] = answered_types[answered_start : answered_start + size]
        return _bio(types)

    def _read(self, answer: str) -> tuple[list[str], list[str]]:
        pairs = [line.strip().rpartition(" ") for line in answer.split("\n")]
        return [word.strip() for word, _, _ in pairs], [tag for _, _, tag in pairs]


WRITINGS: Mapping[TagFormat, Writing] = {"sentinels": _Sentinels(), "lines": _Lines()}


def sentinel(number: int) -> str:
    """Return T5's sentinel with this number."""
    return f"<extra_id_{number}>"


def last_sentinel(prompt: str) -> str | None:
    """Return the sentinel that closes a prompt of `sentinels`, or None."""
    numbers = _SENTINEL.findall(prompt)
    return sentinel(int(numbers[-1])) if numbers else None


def read_words(value: Any) -> tuple[str, ...]:
    """Return the words of a row's value.

    Raises:
        ValueError: there are none, or one of them is empty, is not text or contains a sentinel.
    """
    words = _listed(value)
    if not words:
        raise ValueError("has no words")
    for place, word in enumerate(words, start=1):
        if not word:
            raise ValueError(f"word {place} is empty")
        if _SENTINEL.search(word):
            raise ValueError(f"word {place}, '{word}', contains a sentinel of T5")
    return words


def read_tags(value: Any, words: Sequence[str]) -> Tagged:
    """Return words and tags together. An I- tag that continues no span becomes `O`, as the strict scheme counts it.

    Raises:
        ValueError: the numbers of tags and words differ, or a tag is not BIO.
    """
    tags = _listed(value)
    if len(tags) != len(words):
        raise ValueError(f"has {len(tags)} tags for {len(words)} words")
    for place, tag in enumerate(tags, start=1):
        if not _TAG.fullmatch(tag):
            raise ValueError(f"tag {place}, '{tag}', is not BIO: O, B-type or I-type")
        if tag[2:] in ("O", "I"):
            raise ValueError(f"tag {place}, '{tag}': a type cannot be named O or I, which mean outside and inside")
    return Tagged(tuple(words), _strict(tags))


def _listed(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        return tuple(value.split())
    if not isinstance(value, list | tuple) or not all(isinstance(item, str | int | float) for item in value):
        raise ValueError("is neither a list of words nor text")
    return tuple("_".join(str(item).split()) for item in value)


def _strict(tags: Sequence[str]) -> tuple[str, ...]:
    kept: list[str] = []
    for tag in tags:
        continues = bool(kept) and kept[-1][2:] == tag[2:] and kept[-1] != "O"
        kept.append(tag if continues or not tag.startswith("I-") else "O")
    return tuple(kept)


def _types(tags: Sequence[str]) -> list[str]:
    return ["I" if tag.startswith("I-") else tag.removeprefix("B-") for tag in tags]


def _bio(types: Sequence[str]) -> tuple[str, ...]:
    """Return BIO tags from types as a model wrote them; an empty type is outside."""
    tags: list[str] = []
    for written in types:
        kind = "".join(written.split())
        if kind == "I":
            before = tags[-1] if tags else "O"
            tags.append("O" if before == "O" else f"I-{before[2:]}")
        else:
            tags.append("O" if kind in ("", "O") else f"B-{kind}")
    return tuple(tags)
