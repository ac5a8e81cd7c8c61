"""Encodes a few examples as a run does, without a file."""

from collections.abc import Sequence

from hyperscale.config.data import DataSettings
from hyperscale.data.corpus import report_split
from hyperscale.data.encoded import EncodedRows, ScoredSplit
from hyperscale.data.encoding import SplitInfo
from hyperscale.data.examples import Example
from hyperscale.data.tokenization import TaskTokenizer


def encode_split(tokenizer: TaskTokenizer, examples: Sequence[Example], settings: DataSettings) -> ScoredSplit:
    """Return those within the limits; warnings and errors are those of a run."""
    encoded = tokenizer.encode_examples(examples, settings)
    kept = [
        (tokenizer.scored_example(example, row), row)
        for example, row in zip(examples, encoded, strict=True)
        if row is not None
    ]
    rows = EncodedRows.of(row for _, row in kept)
    shortened = sum(row.shortened for _, row in kept)
    dropped = len(examples) - len(kept)
    report_split(tokenizer, rows, SplitInfo(len(kept), 0, dropped, shortened, 0, ""), settings)
    return ScoredSplit(rows, dropped, shortened, tuple(example for example, _ in kept))
