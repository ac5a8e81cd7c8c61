"""Templates of task files: `{column}` inserts a column's text, doubled braces are literal, and no code runs."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_PIECE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


@dataclass(frozen=True)
class Template:
    """A parsed template. Texts and column names alternate, so `texts` is one longer than `names`."""

    texts: tuple[str, ...]
    names: tuple[str, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that it names, each once, in order of appearance."""
        return tuple(dict.fromkeys(self.names))

    def render(self, values: Mapping[str, str]) -> str:
        """Return the text; `values` must hold every column."""
        pairs = zip(self.texts[1:], self.names, strict=True)
        return self.texts[0] + "".join(values[name] + text for text, name in pairs)


def parse(template: str) -> Template:
    """Split a template into its texts and columns.

    Raises:
        ValueError: a brace has no partner, or a pair of braces is empty.
    """
    texts, names, start = [""], [], 0
    for match in _PIECE.finditer(template):
        texts[-1] += template[start : match.start()]
        start = match.end()
        piece, name = match.group(), match.group(1)
        if piece in ("{{", "}}"):
            texts[-1] += piece[0]
        elif name is None:
            raise ValueError(f"'{piece}' at character {match.start() + 1} has no partner; write a literal brace twice")
        elif not name.strip():
            raise ValueError(f"'{piece}' at character {match.start() + 1} names no column")
        else:
            names.append(name.strip())
            texts.append("")
    texts[-1] += template[start:]
    return Template(tuple(texts), tuple(names))


def text_of(value: Any) -> str:
    """Return a row value as text: a list is joined by spaces; numbers and truth values are written as in JSON.

    Raises:
        ValueError: the value is null or nested.
    """
    if isinstance(value, str):
        return value
    if value is None:
        raise ValueError("is null")
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    if isinstance(value, list | tuple) and not any(isinstance(item, list | tuple | dict) for item in value):
        return " ".join(map(text_of, value))
    raise ValueError(f"holds a nested {type(value).__name__}; only texts, numbers and flat lists can be used")
