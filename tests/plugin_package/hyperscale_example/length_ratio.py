"""A metric: are answers as long as their references?"""

from collections.abc import Sequence


def length_ratio(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Return the smaller total length divided by the larger one, in percent."""
    lengths = sum(map(len, predictions)), sum(map(len, references))
    return 100 * min(lengths) / max(*lengths, 1)
