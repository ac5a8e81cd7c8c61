"""Encoded rows in Arrow columns: mapped from a file of the cache, or held in memory.

A row of such a file has these columns:

    ids           list<uint16> or list<uint32>   prompt and answer, one after the other
    source_tokens uint32                         how many of `ids` are the prompt
    spans         list<uint32>                   first and end of each range that the loss counts; [] = the whole answer

A scored split also keeps the texts of its rows: `source`, `target` (strings) and `content` (binary).
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import datasets
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hyperscale.data.examples import Example
from hyperscale.data.tokenization import Encoded, TokenIds

TEXT_FIELDS = [("source", pa.string()), ("target", pa.string()), ("content", pa.binary())]


def id_type(largest_id: int) -> pa.DataType:
    """Return the smaller of uint16 and uint32 that holds every id of a vocabulary."""
    return pa.uint16() if largest_id < 2**16 else pa.uint32()


def row_schema(ids: pa.DataType, with_texts: bool) -> pa.Schema:
    """Return the columns of a file of encoded rows."""
    fields = [("ids", pa.list_(ids)), ("source_tokens", pa.uint32()), ("spans", pa.list_(pa.uint32()))]
    return pa.schema(fields + (TEXT_FIELDS if with_texts else []))


def pack(rows: Sequence[Encoded], ids: pa.DataType) -> pa.RecordBatch:
    """Return encoded rows as one batch of columns, without texts."""
    tokens = [[*row.source_ids, *row.target_ids] for row in rows]
    spans = [[place for span in row.spans for place in span] for row in rows]
    arrays = [
        _lists(tokens, ids),
        pa.array([len(row.source_ids) for row in rows], pa.uint32()),
        _lists(spans, pa.uint32()),
    ]
    return pa.record_batch(arrays, schema=row_schema(ids, with_texts=False))


def _lists(rows: Sequence[Sequence[int]], kind: pa.DataType) -> pa.Array:
    offsets = np.zeros(len(rows) + 1, np.int32)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    values = np.fromiter((value for row in rows for value in row), kind.to_pandas_dtype(), int(offsets[-1]))
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values, kind))


def open_table(path: Path) -> pa.Table:
    """Map a file of rows; only the pages that are read come into memory, once for all processes of a machine."""
    return datasets.Dataset.from_file(str(path)).data.table


@dataclass(frozen=True)
class _Part:
    """The arrays of one batch of a table, without a copy."""

    ids: NDArray[Any]
    starts: NDArray[np.int32]
    source_tokens: NDArray[np.uint32]
    spans: NDArray[np.uint32]
    span_starts: NDArray[np.int32]


class EncodedRows(Sequence[Encoded]):
    """Encoded examples. The ids of a row are slices of the table's memory and must not be changed."""

    def __init__(self, table: pa.Table, candidate_ids: tuple[TokenIds, ...] = ()) -> None:
        """`candidate_ids`: the answers of a classification, the same for all rows."""
        self._table = table  # keeps the mapping open
        self._candidate_ids = candidate_ids
        self._parts = [_part(batch) for batch in table.to_batches() if batch.num_rows]
        self._firsts = np.cumsum([0, *(len(part.source_tokens) for part in self._parts)]).tolist()

    @classmethod
    def of(cls, rows: Iterable[Encoded]) -> "EncodedRows":
        """Hold encoded rows in memory. They must have the same candidates."""
        known = list(rows)
        table = pa.Table.from_batches([pack(known, pa.uint32())])
        return cls(table, known[0].candidate_ids if known else ())

    def __len__(self) -> int:
        return int(self._firsts[-1])

    @overload
    def __getitem__(self, row: int) -> Encoded: ...
    @overload
    def __getitem__(self, row: slice) -> Sequence[Encoded]: ...
    def __getitem__(self, row: int | slice) -> Encoded | Sequence[Encoded]:
        if isinstance(row, slice):
            return [self[number] for number in range(*row.indices(len(self)))]
        place = range(len(self))[row]
        number = bisect_right(self._firsts, place) - 1
        part, place = self._parts[number], place - self._firsts[number]
        ids = part.ids[part.starts[place] : part.starts[place + 1]]
        spans = part.spans[part.span_starts[place] : part.span_starts[place + 1]].reshape(-1, 2).tolist()
        source = int(part.source_tokens[place])
        return Encoded(ids[:source], ids[source:], self._candidate_ids, tuple((first, end) for first, end in spans))

    @property
    def num_tokens(self) -> NDArray[Any]:
        """Each row's `Encoded.num_tokens`, in the smallest unsigned type that holds them."""
        lengths = [np.diff(part.starts) for part in self._parts]
        longest = max((int(of_part.max()) for of_part in lengths), default=0)
        kind = np.min_scalar_type(longest)
        return np.concatenate([of_part.astype(kind) for of_part in lengths]) if lengths else np.zeros(0, kind)

    @property
    def target_tokens(self) -> NDArray[np.int64]:
        """Each row's number of answer tokens, eos included."""
        parts = [np.diff(part.starts) - part.source_tokens for part in self._parts]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def _part(batch: pa.RecordBatch) -> _Part:
    ids, spans = batch.column("ids"), batch.column("spans")
    return _Part(
        ids.values.to_numpy(),
        ids.offsets.to_numpy(),
        batch.column("source_tokens").to_numpy(),
        spans.values.to_numpy(),
        spans.offsets.to_numpy(),
    )


class ExampleRows(Sequence[Example]):
    """The texts of a scored split; a row becomes an `Example` when it is asked for."""

    def __init__(self, table: pa.Table, candidates: tuple[str, ...]) -> None:
        self._table = table
        self._candidates = candidates

    def __len__(self) -> int:
        return int(self._table.num_rows)

    @overload
    def __getitem__(self, row: int) -> Example: ...
    @overload
    def __getitem__(self, row: slice) -> Sequence[Example]: ...
    def __getitem__(self, row: int | slice) -> Example | Sequence[Example]:
        if isinstance(row, slice):
            return [self[number] for number in range(*row.indices(len(self)))]
        place = range(len(self))[row]
        values = [self._table.column(name)[place].as_py() for name, _ in TEXT_FIELDS]
        return Example(values[0], values[1], self._candidates, values[2])

    def __iter__(self) -> Iterator[Example]:
        for batch in self._table.to_batches():
            columns = (batch.column(name).to_pylist() for name, _ in TEXT_FIELDS)
            for source, target, content in zip(*columns, strict=True):
                yield Example(source, target, self._candidates, content)

    @property
    def contents(self) -> set[bytes]:
        """The digests of the texts, see `Example.content`."""
        return set(self._table.column("content").to_pylist())


@dataclass(frozen=True)
class EncodedSplit:
    """The rows of one split that are within the token limits."""

    encoded: EncodedRows
    dropped: int
    """Rows left out: no prompt at all, beyond a limit, or with more words than there are sentinels."""
    shortened: int = 0
    """Rows whose prompt was shortened to `max_source_tokens`."""


@dataclass(frozen=True)
class ScoredSplit(EncodedSplit):
    """A split that is scored. Its examples are in the order of its encoded rows."""

    examples: Sequence[Example] = ()
