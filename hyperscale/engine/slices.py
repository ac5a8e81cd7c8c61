"""Reading parts of tensors out of safetensors files with `pread`: no mapping, no copy of a whole tensor.

The format: 8 bytes of header length, a JSON header of name -> dtype, shape, [begin, end), then the row-major bytes
(github.com/huggingface/safetensors, "Format").
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hyperscale.errors import BackboneError

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
_CHUNK_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """First byte in the file."""


def index_tensors(files: Sequence[Path], keep: Callable[[str], bool] = lambda _name: True) -> dict[str, StoredTensor]:
    """List the tensors of a checkpoint's files for whose names `keep` is true.

    Raises:
        BackboneError: a file is not a safetensors file, is truncated, or holds a dtype that a backbone cannot have.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        tensors.update(_index_file(file, keep))
    return tensors


def _index_file(file: Path, keep: Callable[[str], bool]) -> dict[str, StoredTensor]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > size - 8:
            raise BackboneError(
                f"{file} is not a safetensors file or is truncated: its header needs {length} bytes of {size}"
            )
        header = stream.read(length)
    try:
        table = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__" and keep(name)}
        return {name: _stored(file, name, entry, 8 + length, size) for name, entry in table.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BackboneError(f"{file} is not a safetensors file: its header is invalid ({error})") from error


def _stored(file: Path, name: str, entry: Mapping[str, Any], data: int, size: int) -> StoredTensor:
    """Check one row of the table; `data` is where the tensors begin in the file."""
    begin, end = entry["data_offsets"]
    if data + end > size:
        raise BackboneError(
            f"{file} is cut short: tensor '{name}' ends at byte {data + end} of {size}; fetch the file again"
        )
    if entry["dtype"] not in _DTYPES:
        raise BackboneError(
            f"{file}: tensor '{name}' is {entry['dtype']}; a backbone's weights are {', '.join(_DTYPES)}"
        )
    stored = StoredTensor(file, _DTYPES[entry["dtype"]], tuple(entry["shape"]), data + begin)
    if math.prod(stored.shape) * stored.dtype.itemsize != end - begin:
        raise BackboneError(f"{file} is damaged: tensor '{name}' has {end - begin} bytes for shape {entry['shape']}")
    return stored


@dataclass(frozen=True)
class JoinedTensor:
    """Equal matrices of a checkpoint that are one parameter, one after the other, as the experts of a block are."""

    pieces: tuple[StoredTensor, ...]
    shape: tuple[int, ...]
    """Of the parameter."""


def join_tensors(pieces: Sequence[StoredTensor], shape: tuple[int, ...]) -> JoinedTensor:
    """Return the pieces as one parameter [E, N, D] of equal matrices [E N / pieces, D].

    Raises:
        BackboneError: they do not make a parameter of this shape.
    """
    rows = math.prod(shape[:-1]) // len(pieces)
    for piece in pieces:
        if piece.shape != (rows, shape[-1]) or rows * len(pieces) != math.prod(shape[:-1]):
            raise BackboneError(
                f"{piece.file} holds {len(pieces)} matrices of experts, one of {list(piece.shape)}, which do not make "
                f"the {list(shape)} of config.json; the checkpoint is incomplete"
            )
    return JoinedTensor(tuple(pieces), shape)


class SliceReader:
    """Reads flat element ranges; keeps the files open."""

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}

    def read_into(self, target: Tensor, stored: StoredTensor | JoinedTensor, start: int) -> None:
        """Fill the 1-D `target` with the stored tensor's flat elements from `start` on.

        They are converted to the target's dtype and device. Elements past the tensor's end (the padding of a last
        shard) are left as they are.
        """
        if isinstance(stored, JoinedTensor):
            self._read_pieces(target, stored.pieces, start)
            return
        total = math.prod(stored.shape)
        num_elements = max(0, min(target.numel(), total - start))
        width = stored.dtype.itemsize
        for done in range(0, num_elements, _CHUNK_BYTES // width):
            count = min(num_elements - done, _CHUNK_BYTES // width)
            data = self._pread(stored.file, count * width, stored.offset + (start + done) * width)
            target[done : done + count].copy_(torch.frombuffer(data, dtype=stored.dtype))

    def _read_pieces(self, target: Tensor, pieces: Sequence[StoredTensor], start: int) -> None:
        each = math.prod(pieces[0].shape)
        for number in range(start // each, min(len(pieces), -(-(start + target.numel()) // each))):
            first, last = max(start, number * each), min(start + target.numel(), (number + 1) * each)
            self.read_into(target[first - start : last - start], pieces[number], first - number * each)

    def _pread(self, file: Path, count: int, offset: int) -> bytearray:
        if file not in self._open:
            self._open[file] = os.open(file, os.O_RDONLY)
        data = bytearray(count)
        view = memoryview(data)
        done = 0
        while done < count:
            got = os.preadv(self._open[file], [view[done:]], offset + done)
            if got == 0:
                raise BackboneError(f"{file} became shorter while it was read (at byte {offset + done})")
            done += got
        return data

    def close(self) -> None:
        """Close the files."""
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()


@contextmanager
def slice_reader() -> Iterator[SliceReader]:
    """A reader that closes its files at the end of the `with`."""
    reader = SliceReader()
    try:
        yield reader
    finally:
        reader.close()
