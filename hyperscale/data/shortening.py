"""Prompts that exceed their limit."""

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def shorten(ids: Sequence[T], most: int) -> tuple[T, ...]:
    """Take tokens out of the middle: instructions, chat headers, bos and eos stand at the ends."""
    if len(ids) <= most:
        return tuple(ids)
    head = most // 2
    return tuple(ids[:head]) + tuple(ids[len(ids) - (most - head) :])
