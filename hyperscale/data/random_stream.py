"""Random draws that are the same under every version of numpy.

numpy promises the integers of its bit generators for good, but not what `Generator` makes of them (its NEP 19). The few
draws that a mixture needs are therefore computed here, from Philox's integers, as numpy 2 does: an order of samples
that was begun with numpy's own draws continues.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import chain, repeat
from typing import Any

import numpy as np

Ints = np.ndarray[Any, np.dtype[np.int64]]
_LOW_HALF = np.uint64(0xFFFFFFFF)
_SMALL = 10_000
"""Orders of this size are computed here in milliseconds."""


class RandomStream:
    """One stream of draws, decided by a few integers."""

    def __init__(self, *entropy: int) -> None:
        self._bits = np.random.Philox(np.random.SeedSequence(list(entropy)))

    def choice(self, count: int, probabilities: Sequence[float]) -> Ints:
        """Return `count` indices, each drawn by its probability."""
        bounds = np.cumsum(np.asarray(probabilities, dtype=np.float64))
        uniform = (self._bits.random_raw(count) >> np.uint64(11)) * 2.0**-53
        return np.searchsorted(bounds / bounds[-1], uniform, side="right").astype(np.int64)

    def permutation(self, size: int) -> Ints:
        """Return the numbers below `size` in random order: Fisher and Yates's shuffle, from the last place down.

        Each place is drawn by rejection from the low bits of 32-bit numbers. Large orders come from numpy itself, in
        compiled code and without Python's integers, where this numpy draws what is computed here.
        """
        if size > _SMALL and _numpy_permutes_alike():
            return np.random.Generator(self._bits).permutation(size)
        return self._permutation(size)

    def _permutation(self, size: int) -> Ints:
        order = list(range(size))
        numbers, place = self._halves(size), size - 1
        while place > 0:
            mask = (1 << place.bit_length()) - 1
            for number in numbers:
                other = number & mask
                if other <= place:
                    order[place], order[other] = order[other], order[place]
                    place -= 1
                    if place <= mask >> 1:  # the next place takes a bit less
                        break
        return np.array(order, dtype=np.int64)

    def _halves(self, at_once: int) -> Iterator[int]:
        """Return 32-bit numbers without end: of each word its low half first."""
        return chain.from_iterable(map(self._halves_of, repeat(at_once)))

    def _halves_of(self, num_words: int) -> list[int]:
        words = self._bits.random_raw(num_words)
        halves: list[int] = np.stack([words & _LOW_HALF, words >> np.uint64(32)], axis=1).ravel().tolist()
        return halves


@cache
def _numpy_permutes_alike() -> bool:
    """Whether this numpy's permutations are those that are computed here, at a size that needs 17 bits."""
    size = 2**16 + 4321
    ours = RandomStream(0)._permutation(size)
    return bool(np.array_equal(np.random.Generator(RandomStream(0)._bits).permutation(size), ours))
