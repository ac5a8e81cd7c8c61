"""Splits of a task: no text is in two of them, a missing validation split is carved, and limits are applied.

Hashes of the texts decide everything, so the result is the same on every machine and in every order of work.
"""

import hashlib
from collections.abc import Sequence

from hyperscale.data.examples import Example

_VALIDATION_SHARE = 0.1
_LARGEST_VALIDATION = 2000


def text_key(example: Example) -> str:
    """Return the prompt in lower case with single spaces: prompts with equal keys count as the same text."""
    return " ".join(example.source.casefold().split())


def without_texts_of(examples: Sequence[Example], *others: Sequence[Example]) -> list[Example]:
    """Return the examples whose text does not occur in the other splits."""
    excluded = {text_key(example) for other in others for example in other}
    return [example for example in examples if text_key(example) not in excluded]


def carve_validation(train: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """Divide training examples into training and validation. A hash chooses a tenth of the texts, 1 to 2000 of them.

    Equal texts stay together. Fewer than two different texts give no validation split.
    """
    keys = [text_key(example) for example in train]
    ordered = sorted(set(keys), key=_hash)
    size = min(max(1, round(len(ordered) * _VALIDATION_SHARE)), _LARGEST_VALIDATION, len(ordered) - 1)
    carved = set(ordered[: max(size, 0)])
    return (
        [example for example, key in zip(train, keys, strict=True) if key not in carved],
        [example for example, key in zip(train, keys, strict=True) if key in carved],
    )


def limit(examples: Sequence[Example], most: int | None) -> list[Example]:
    """Return at most `most` examples in their order. A hash chooses them, because files are often sorted by label."""
    if most is None or len(examples) <= most:
        return list(examples)
    ranked = sorted(range(len(examples)), key=lambda row: _hash(f"{row} {examples[row].source}"))
    return [examples[row] for row in sorted(ranked[:most])]


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
