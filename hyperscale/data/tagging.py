"""Sequence labelling as text: words and one BIO tag for each, written for a model and read back from its answer.

Tags are written by their type alone: `city` begins a span (B-city), `I` continues the span before it, `O` is outside.

`sentinels`, for encoder-decoders (SentT′, HyperLoader, arXiv 2407.01411):
    <extra_id_0> to <extra_id_1> new <extra_id_2> york <extra_id_3>
    <extra_id_0> O <extra_id_1> city <extra_id_2> I <extra_id_3>
`lines`, for decoder-only models, every word said again before its tag, as in files of the CoNLL tasks:
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
    """Where a sequence-labelling task has its words and tags, and how they are written."""

    tokens: str = "tokens"
    """Column of the words: a list, or text with spaces between them."""
    tags: str = "tags"
    """Column of the tags, one for each word: `O`, `B-type`, `I-type`."""
    format: TagFormat | None = None
    """None: `sentinels` for an encoder-decoder, `lines` for a decoder-only model."""


@dataclass(frozen=True, slots=True)
class Tagged:
    """A sentence: its words, and a BIO tag for each. Words read back from `sentinels` are empty texts."""

    words: tuple[str, ...]
    tags: tuple[str, ...]


class Writing(Protocol):
    """One way to write sentences and tags as text."""

    def prompt(self, words: Sequence[str]) -> str: ...

    def answer(self, sentence: Tagged) -> str: ...

    def reference(self, answer: str) -> Tagged:
        """Return what an answer of `answer` says."""
        ...

    def tags(self, answer: str, words: Sequence[str]) -> tuple[str, ...]:
        """Return the BIO tag that a generated answer gives each word; `O` where it says nothing of one."""
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
        said: dict[int, str] = {}
        for number, text in zip(pieces[::2], pieces[1::2], strict=True):
            said.setdefault(int(number), text)  # a model that goes round in circles is taken at its first word
        return _bio([said.get(place, "") for place in range(len(words))])

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
        said, types = self._read(answer)
        found = [""] * len(words)
        # A word left out, doubled or misspelt must not shift the tags of the others.
        for start, said_start, size in SequenceMatcher(None, words, said, autojunk=False).get_matching_blocks():
            found[start : start + size] = types[said_start : said_start + size]
        return _bio(found)

    def _read(self, answer: str) -> tuple[list[str], list[str]]:
        pairs = [line.strip().rpartition(" ") for line in answer.split("\n")]
        return [word.strip() for word, _, _ in pairs], [tag for _, _, tag in pairs]


WRITINGS: Mapping[TagFormat, Writing] = {"sentinels": _Sentinels(), "lines": _Lines()}


def sentinel(number: int) -> str:
    """Return T5's sentinel of that number."""
    return f"<extra_id_{number}>"


def last_sentinel(prompt: str) -> str | None:
    """Return the sentinel that closes a prompt of `sentinels`, or None."""
    found = _SENTINEL.findall(prompt)
    return sentinel(int(found[-1])) if found else None


def read_words(value: Any) -> tuple[str, ...]:
    """Return the words of a row's value.

    Raises:
        ValueError: there are none, or one of them is no text or holds a sentinel.
    """
    words = _listed(value)
    if not words:
        raise ValueError("has no words")
    for place, word in enumerate(words, start=1):
        if not word:
            raise ValueError(f"word {place} is empty")
        if _SENTINEL.search(word):
            raise ValueError(f"word {place}, '{word}', holds a sentinel of T5")
    return words


def read_tags(value: Any, words: Sequence[str]) -> Tagged:
    """Return words and tags together; an I- tag that continues nothing is no span in the strict sense: `O`.

    Raises:
        ValueError: not as many tags as words, or one of them is not BIO.
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
    """Return BIO tags from types as a model wrote them; whatever says nothing is outside."""
    tags: list[str] = []
    for written in types:
        kind = "".join(written.split())
        if kind == "I":
            before = tags[-1] if tags else "O"
            tags.append("O" if before == "O" else f"I-{before[2:]}")
        else:
            tags.append("O" if kind in ("", "O") else f"B-{kind}")
    return tuple(tags)
