"""Writes the encoded rows of one task: files of Arrow columns, and `info.json` with what belongs to them."""

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from hyperscale.config.data import DataSettings
from hyperscale.data.division import Selection, as_keys
from hyperscale.data.encoded import TEXT_FIELDS, id_type, pack, row_schema
from hyperscale.data.examples import renderer
from hyperscale.data.file_digest import checksum
from hyperscale.data.origins import Split
from hyperscale.data.rendering import (
    RenderedChunk,
    Stores,
    hashed,
    pack_texts,
    render_chunk,
    select_rows,
    store_texts,
    unpack_texts,
)
from hyperscale.data.rows import Row
from hyperscale.data.tokenization import TaskTokenizer
from hyperscale.data.workers import Workers
from hyperscale.errors import DataError
from hyperscale.logger import get_logger

_logger = get_logger(__name__)

INFO = "info.json"


@dataclass(frozen=True)
class SplitInfo:
    """One file of encoded rows."""

    rows: int
    tokens: int
    dropped: int
    shortened: int
    bytes: int
    xxh3: str
    """Checksum of the file."""
    problem: str | None = None
    """Why the test split could not be encoded: an error only where it is needed."""


@dataclass(frozen=True)
class EntryInfo:
    """What a task's encoded rows came to."""

    digest: str
    """sha256 (hex) of all examples of all splits."""
    labels: dict[str, str] | None
    candidate_ids: list[list[int]]
    most_common_answer: str
    """Of the encoded training rows; of equally common answers the first in alphabetical order."""
    splits: dict[Split, SplitInfo]


@dataclass(frozen=True)
class EncodedChunk:
    """A chunk of encoded rows: those within the limits."""

    rows: pa.RecordBatch
    answers: NDArray[np.uint64]
    """A hash of each row's answer."""
    dropped: int
    shortened: int


@dataclass(frozen=True)
class Encoder:
    """Renders and encodes chunks of rows of one task; it goes to other processes whole."""

    tokenizer: TaskTokenizer
    settings: DataSettings
    ids: pa.DataType
    candidates: tuple[str, ...]

    def render(self, rows: list[Row]) -> RenderedChunk:
        return render_chunk(self.tokenizer.task, rows)

    def encode(self, texts: pa.RecordBatch) -> EncodedChunk:
        return self._encode(texts, with_texts=False)

    def encode_scored(self, texts: pa.RecordBatch) -> EncodedChunk:
        return self._encode(texts, with_texts=True)

    def _encode(self, texts: pa.RecordBatch, with_texts: bool) -> EncodedChunk:
        examples = unpack_texts(texts, self.candidates)
        encoded = self.tokenizer.encode_examples(examples, self.settings)
        kept = [(example, row) for example, row in zip(examples, encoded, strict=True) if row is not None]
        rows = [row for _, row in kept]
        packed = pack(rows, self.ids)
        if with_texts:
            scored = pack_texts([self.tokenizer.scored_example(example, row) for example, row in kept])
            columns = [*packed.columns, *(scored.column(name) for name, _ in TEXT_FIELDS)]
            packed = pa.record_batch(columns, schema=row_schema(self.ids, with_texts=True))
        return EncodedChunk(
            packed,
            as_keys(_answer_hash(example.target) for example, _ in kept),
            dropped=len(encoded) - len(rows),
            shortened=sum(row.shortened for row in rows),
        )


def write_entry(
    tokenizer: TaskTokenizer,
    settings: DataSettings,
    source: str,
    rows: Mapping[Split, Iterable[Row]],
    excluded: Collection[bytes],
    folder: Path,
    scratch: Path,
) -> EntryInfo:
    """Render, divide and encode a task's rows into `folder`.

    Args:
        tokenizer: its task has its labels.
        source: printable origin of the rows, for messages.
        excluded: digests (`Example.content`) of texts that must not be among the training rows.
        folder: exists and is empty.
        scratch: an existing folder for files that nobody needs afterwards.

    Raises:
        DataError: a row is wrong, or a split has no rows left.
    """
    task = tokenizer.task
    candidates = renderer(task).candidates
    candidate_ids = tokenizer.encode_candidates(candidates)
    largest_id = max(tokenizer.tokenizer.get_vocab().values(), default=0)
    encoder = Encoder(tokenizer, settings, id_type(largest_id), candidates)
    where = f"task '{task.name}': {source}"
    with Workers(encoder, where) as workers:
        stores = store_texts(where, rows, scratch, lambda chunks: workers.map("render", chunks))
        splits = select_rows(task.name, stores, row_limits(settings))
        if excluded:
            splits["train"] = _without(excluded, task.name, splits["train"], stores)
        digest = hashlib.sha256()
        infos: dict[Split, SplitInfo] = {}
        answer = ""
        for split, selection in splits.items():
            texts = hashed(split, stores[selection.origin].batches(selection.mask), digest)
            chunks = workers.map("encode" if split == "train" else "encode_scored", texts)
            infos[split], answers = _write_split(split, chunks, folder / f"{split}.arrow", encoder.ids)
            if split == "train":
                answer = _most_common(answers, stores[selection.origin].batches(selection.mask))
    info = EntryInfo(digest.hexdigest(), task.labels, [list(ids) for ids in candidate_ids], answer, infos)
    (folder / INFO).write_text(json.dumps(asdict(info), indent=2) + "\n", encoding="utf-8")
    return info


def row_limits(settings: DataSettings) -> dict[Split, int | None]:
    """Return the largest number of rows of each split."""
    return {
        "train": settings.train_limit,
        "validation": settings.validation_limit,
        "test": settings.test_limit,
    }


def read_info(folder: Path) -> EntryInfo:
    """Read `info.json`; raises OSError, ValueError, KeyError or TypeError where it is missing or damaged."""
    raw = json.loads((folder / INFO).read_text(encoding="utf-8"))
    splits = {split: SplitInfo(**fields) for split, fields in raw.pop("splits").items()}
    return EntryInfo(**raw, splits=splits)


def _write_split(
    split: Split, chunks: Iterable[EncodedChunk], path: Path, ids: pa.DataType
) -> tuple[SplitInfo, NDArray[np.uint64]]:
    """Write the file of one split; return what it holds and a hash of every row's answer."""
    rows = tokens = dropped = shortened = 0
    answers: list[NDArray[np.uint64]] = []
    problem = None
    with path.open("wb") as stream, pa.ipc.new_stream(stream, row_schema(ids, split != "train")) as writer:
        try:
            for chunk in chunks:
                dropped += chunk.dropped
                shortened += chunk.shortened
                if chunk.rows.num_rows:
                    rows += chunk.rows.num_rows
                    tokens += len(chunk.rows.column("ids").values)
                    answers.append(chunk.answers)
                    writer.write_batch(chunk.rows)
        except DataError as error:
            if split != "test":
                raise
            problem = str(error)
    size, digest = path.stat().st_size, checksum(path)
    info = SplitInfo(rows, tokens, dropped, shortened, size, digest, problem)
    return info, np.concatenate(answers) if answers else np.zeros(0, np.uint64)


def _without(excluded: Collection[bytes], task: str, train: Selection, stores: Stores) -> Selection:
    """Leave out the training rows whose texts have a digest in `excluded`."""
    contents = (
        content for batch in stores[train.origin].batches(train.mask) for content in batch.column("content").to_pylist()
    )
    free = np.fromiter((content not in excluded for content in contents), np.bool_)
    if free.all():
        return train
    if not free.any():
        raise DataError(f"task '{task}': no training rows are left; other tasks score all of their texts")
    _logger.info("task %s: %d training rows left out because another task scores their texts", task, int((~free).sum()))
    mask = train.mask.copy()
    mask[np.flatnonzero(mask)] = free
    return Selection(train.origin, mask)


def _most_common(hashes: NDArray[np.uint64], texts: Iterable[pa.RecordBatch]) -> str:
    """Return the most common answer; of equally common ones the first in alphabetical order."""
    if not len(hashes):
        return ""
    values, counts = np.unique(hashes, return_counts=True)
    chosen = set(values[counts == counts.max()].tolist())
    answers = (answer for batch in texts for answer in batch.column("target").to_pylist())
    return min((answer for answer in answers if _answer_hash(answer) in chosen), default="")


def _answer_hash(answer: str) -> int:
    return xxhash.xxh3_64_intdigest(answer.encode())
