"""Splits of a task: no text is in two of them, a missing validation split is carved, and limits are applied.

Hashes of the texts decide everything, so the result is the same on every machine and in every order of work. A split
is a mask over the rows that were read, so that rows stay where they are: on disk, if there are many.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hyperscale.data.origins import Split
from hyperscale.errors import DataError
from hyperscale.logger import get_logger

_logger = get_logger(__name__)

_VALIDATION_SHARE = 0.1
_LARGEST_VALIDATION = 2000

Keys = NDArray[np.uint64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Selection:
    """Rows of one split: those rows that were read for `origin` and have True in `mask`."""

    origin: Split
    mask: Mask

    def __len__(self) -> int:
        return int(self.mask.sum())


def text_key(source: str) -> str:
    """Return the prompt in lower case with single spaces: prompts with equal keys count as the same text."""
    return " ".join(source.casefold().split())


def hash_text(text: str) -> int:
    """Return the first 8 bytes of a text's sha256."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


def divide(task: str, keys: Mapping[Split, Keys]) -> dict[Split, Selection]:
    """Return the rows of each split.

    A text that occurs in two splits stays in the later one of train, validation, test. If there are no validation rows,
    a tenth of the training texts becomes the validation split.

    Args:
        keys: `hash_text(text_key(prompt))` of every row that was read.

    Raises:
        DataError: there are no training rows, or a split has no rows left.
    """
    if "train" not in keys:
        raise DataError(f"task '{task}': there are no training rows, only {', '.join(keys)}")
    nothing = np.zeros(0, np.uint64)
    own_validation, test = keys.get("validation", nothing), keys.get("test", nothing)
    train = ~np.isin(keys["train"], np.concatenate([own_validation, test]))
    validation = ~np.isin(own_validation, test)
    for split, left_out in (("train", int((~train).sum())), ("validation", int((~validation).sum()))):
        if left_out:
            _logger.info("task %s: %d %s rows left out because a later split has their texts", task, left_out, split)
    splits = {"train": Selection("train", train), "validation": Selection("validation", validation)}
    if not len(own_validation):
        carved = train & np.isin(keys["train"], _carved(keys["train"][train]))
        splits = {"train": Selection("train", train & ~carved), "validation": Selection("train", carved)}
        _logger.info("task %s: %d validation rows carved from the training rows", task, len(splits["validation"]))
    for split, left in splits.items():
        if not len(left):
            raise DataError(f"task '{task}': no {split} rows are left once every text is in one split only; add rows")
    if len(test):
        splits["test"] = Selection("test", np.ones(len(test), np.bool_))
    return splits  # type: ignore[return-value]  # mypy forgets that its keys are literals


def _carved(train: Keys) -> Keys:
    """Choose a tenth of the texts, 1 to 2000 of them, for validation; fewer than two texts give none."""
    texts = np.unique(train)
    size = min(max(1, round(len(texts) * _VALIDATION_SHARE)), _LARGEST_VALIDATION, len(texts) - 1)
    return texts[: max(size, 0)]


def limit(mask: Mask, order: Keys, most: int) -> Mask:
    """Return the mask of the `most` chosen rows with the smallest `order`, which has one value for each chosen row."""
    chosen = np.zeros_like(mask)
    chosen[np.flatnonzero(mask)[np.argsort(order, kind="stable")[:most]]] = True
    return chosen


def as_keys(hashes: Any) -> Keys:
    """Return hashes as an array."""
    return np.fromiter(hashes, np.uint64)
