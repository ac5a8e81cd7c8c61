"""Rows become texts on disk, and the texts are divided into splits.

The texts wait on disk until all rows are read, because the split of a row depends on the texts of the others. Memory
holds a few chunks of rows, and 8 to 24 bytes for each row.
"""

import json
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from hyperscale.data.division import Keys, Mask, Selection, as_keys, divide, hash_text, limit, text_key
from hyperscale.data.encoded import TEXT_FIELDS
from hyperscale.data.examples import Example, renderer
from hyperscale.data.origins import SPLITS, Split
from hyperscale.data.rows import Row
from hyperscale.data.tasks import Task
from hyperscale.errors import DataError

T = TypeVar("T")

CHUNK = 5_000
"""Rows that are rendered or encoded at once."""

_STORE_FIELDS = [*TEXT_FIELDS, ("conversation", pa.binary())]
"""Columns of a `TextStore`. A conversation is pickled: a template may read any of its values."""

RenderedChunk = tuple[pa.RecordBatch, Keys]
"""Texts of a chunk of rows, and `hash_text(text_key(prompt))` of each."""


def render_chunk(task: Task, rows: list[Row]) -> RenderedChunk:
    """Render some rows.

    Raises:
        DataError: a row is wrong.
    """
    render = renderer(task).example
    examples = [render(row) for row in rows]
    return pack_texts(examples), as_keys(hash_text(text_key(example.source)) for example in examples)


@dataclass(frozen=True)
class TextStore:
    """The texts of the rows that were read for one split, in a file."""

    path: Path
    keys: Keys

    def batches(self, mask: Mask) -> Iterator[pa.RecordBatch]:
        """Yield the texts of the rows that `mask` chooses, in order."""
        first = 0
        with pa.OSFile(str(self.path)) as stream, pa.ipc.open_stream(stream) as reader:
            for batch in reader:
                of_batch = mask[first : first + batch.num_rows]
                first += batch.num_rows
                if of_batch.any():
                    yield batch if of_batch.all() else batch.filter(pa.array(of_batch))


def pack_texts(examples: Sequence[Example]) -> pa.RecordBatch:
    """Return examples as one batch of columns."""
    columns: list[list[Any]] = [[getattr(example, name) for example in examples] for name, _ in TEXT_FIELDS]
    columns.append([example.conversation and pickle.dumps(example.conversation) for example in examples])
    arrays = [pa.array(values, kind) for values, (_, kind) in zip(columns, _STORE_FIELDS, strict=True)]
    return pa.record_batch(arrays, schema=pa.schema(_STORE_FIELDS))


def unpack_texts(batch: pa.RecordBatch, candidates: tuple[str, ...]) -> list[Example]:
    """Return the examples that `pack_texts` packed."""
    columns = (batch.column(name).to_pylist() for name, _ in _STORE_FIELDS)
    return [
        Example(source, target, candidates, content, turns and pickle.loads(turns))
        for source, target, content, turns in zip(*columns, strict=True)
    ]


Stores = Mapping[Split, TextStore]


def store_texts(
    where: str,
    rows: Mapping[Split, Iterable[Row]],
    folder: Path,
    render: Callable[[Iterable[list[Row]]], Iterator[RenderedChunk]],
) -> Stores:
    """Render all rows into files in `folder`. `render`: `render_chunk` of one chunk after another.

    Args:
        where: names task and source in messages.

    Raises:
        DataError: a row is wrong, or a split has no rows.
    """
    stores: dict[Split, TextStore] = {}
    for split in SPLITS:
        if split not in rows:
            continue
        path, keys = folder / f"{split}.texts", []
        with path.open("wb") as stream, pa.ipc.new_stream(stream, pa.schema(_STORE_FIELDS)) as writer:
            for texts, of_chunk in render(chunked(rows[split], CHUNK)):
                writer.write_batch(texts)
                keys.append(of_chunk)
        if not keys:
            raise DataError(f"{where} has no rows for {split}")
        stores[split] = TextStore(path, np.concatenate(keys))
    return stores


def select_rows(task: str, stores: Stores, most: Mapping[Split, int | None]) -> dict[Split, Selection]:
    """Divide the rows into splits that share no text, with at most `most` rows each. A hash chooses the rows.

    Raises:
        DataError: there are no training rows, or a split has no rows left.
    """
    splits = divide(task, {split: store.keys for split, store in stores.items()})
    for split, selection in splits.items():
        limited = most[split]
        if limited is not None and len(selection) > limited:
            order = as_keys(_order_of_limit(stores[selection.origin].batches(selection.mask)))
            splits[split] = Selection(selection.origin, limit(selection.mask, order, limited))
    return splits


def _order_of_limit(batches: Iterable[pa.RecordBatch]) -> Iterator[int]:
    sources = (source for batch in batches for source in batch.column("source").to_pylist())
    return (hash_text(f"{row} {source}") for row, source in enumerate(sources))


def hashed(split: Split, batches: Iterable[pa.RecordBatch], digest: Any) -> Iterator[pa.RecordBatch]:
    """Yield batches of texts; `digest`, of hashlib, takes every example."""
    for texts in batches:
        for source, target in zip(texts.column("source").to_pylist(), texts.column("target").to_pylist(), strict=True):
            digest.update(json.dumps([split, source, target]).encode() + b"\n")
        yield texts


def chunked(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield lists of `size` items; the last may be shorter."""
    waiting = iter(items)
    while chunk := list(islice(waiting, size)):
        yield chunk
