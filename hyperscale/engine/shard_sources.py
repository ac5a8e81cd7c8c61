"""What fills a rank's shard of each parameter: a tensor of a file as it is, or quantized on the way.

A rank reads the rows or blocks that its shard touches. Their numbers do not depend on where shards begin, so that any
number of ranks stores the same bits.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from hyperscale.engine.collective import Collective
from hyperscale.engine.slices import JoinedTensor, SliceReader, StoredTensor
from hyperscale.model.quantized import codes, int8
from hyperscale.model.quantized.codes import BLOCK, GROUP, FourBitKind

_READ_BYTES = 16 * 1024 * 1024
"""Of weights that are quantized at once, in fp32."""


class Source(Protocol):
    """Fills 1-D shards with the flat elements from `start` on, and leaves the padding of a last shard as it is.

    `dtype` is the backbone's: weights are rounded to it before they are quantized, as where the whole model is loaded.
    """

    def fill(self, share: Tensor, start: int, reader: SliceReader, dtype: torch.dtype) -> None:
        """Fill a rank's whole shard; every rank must call this, parameter by parameter in the model's order."""
        ...

    def fill_sample(self, sample: Tensor, start: int, reader: SliceReader, dtype: torch.dtype) -> None:
        """Fill a few elements with what `fill` has put there."""
        ...


@dataclass(frozen=True)
class PlainSource:
    """A tensor as it is in its file, in the dtype of the shard."""

    stored: StoredTensor | JoinedTensor

    def fill(self, share: Tensor, start: int, reader: SliceReader, dtype: torch.dtype) -> None:
        reader.read_into(share, self.stored, start)

    fill_sample = fill


@dataclass(frozen=True)
class Int8Source:
    """The integers or the scales of a tensor that is stored in 8 bits."""

    stored: StoredTensor
    """[out, in]"""
    wants_scales: bool

    def fill(self, share: Tensor, start: int, reader: SliceReader, dtype: torch.dtype) -> None:
        num_rows, width = self.stored.shape
        each = 1 if self.wants_scales else width
        end = min(start + share.numel(), num_rows * each)
        at_once = max(1, _READ_BYTES // (4 * width))
        for first in range(start // each, -(-end // each), at_once):
            last = min(first + at_once, -(-end // each))
            rows = _read(reader, self.stored, first * width, last * width, dtype)
            integers, scales = int8.quantize(rows.view(-1, width))
            piece = scales if self.wants_scales else integers.flatten()
            _put(piece, first * each, share, start)

    fill_sample = fill


@dataclass
class FourBitTensor:
    """A tensor that is stored in four bits; its three parameters are filled one after the other."""

    stored: StoredTensor
    kind: FourBitKind
    collective: Collective
    absmax: Tensor = field(default_factory=lambda: torch.empty(0))
    """fp32 [blocks] of the whole tensor, between filling the codes and filling the scales."""

    def encoded(
        self, start: int, end: int, reader: SliceReader, dtype: torch.dtype
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield the codes and absmax of all blocks that touch the weights from `start` to `end`, with the block."""
        numel = prod(self.stored.shape)
        at_once = _READ_BYTES // 4 // BLOCK
        last = codes.num_blocks(min(end, numel))
        for block in range(start // BLOCK, last, at_once):
            stop = min(block + at_once, last)
            values = _read(reader, self.stored, block * BLOCK, min(stop * BLOCK, numel), dtype)
            yield block, *codes.encode(values, self.kind)


@dataclass(frozen=True)
class CodeSource:
    """Two codes a byte."""

    tensor: FourBitTensor

    def fill(self, share: Tensor, start: int, reader: SliceReader, dtype: torch.dtype) -> None:
        """Fill the shard, and gather the absmax of all blocks: their mean is needed, and each rank has read its own."""
        first, last = (codes.num_blocks(2 * byte) for byte in (start, start + share.numel()))
        own = [torch.empty(0)]
        for block, packed, absmax in self.tensor.encoded(2 * start, 2 * (start + share.numel()), reader, dtype):
            _put(packed, block * (BLOCK // 2), share, start)
            # A block that two ranks touch belongs to the one whose shard it begins in.
            own.append(absmax[max(0, first - block) : max(0, last - block)])
        self.tensor.absmax = torch.cat(self.tensor.collective.gather(torch.cat(own)))

    def fill_sample(self, sample: Tensor, start: int, reader: SliceReader, dtype: torch.dtype) -> None:
        for block, packed, _ in self.tensor.encoded(2 * start, 2 * (start + sample.numel()), reader, dtype):
            _put(packed, block * (BLOCK // 2), sample, start)


@dataclass(frozen=True)
class AbsmaxSource:
    """The absmax of each block, in 8 bits."""

    tensor: FourBitTensor

    def fill(self, share: Tensor, start: int, reader: SliceReader, dtype: torch.dtype) -> None:
        absmax = self.tensor.absmax
        group, end = start // GROUP * GROUP, -(-(start + share.numel()) // GROUP) * GROUP
        indices, _ = codes.compress(absmax[group:end], codes.mean_absmax(absmax))
        _put(indices, group, share, start)

    fill_sample = fill


@dataclass(frozen=True)
class ScaleSource:
    """The scale of each group of absmax values, and their offset."""

    tensor: FourBitTensor

    def fill(self, share: Tensor, start: int, reader: SliceReader, dtype: torch.dtype) -> None:
        offset = codes.mean_absmax(self.tensor.absmax)
        scales = codes.group_scales(codes.in_groups(self.tensor.absmax, offset))
        _put(codes.scale_bits(scales, offset), 0, share, start)

    fill_sample = fill


def _read(reader: SliceReader, stored: StoredTensor, start: int, end: int, dtype: torch.dtype) -> Tensor:
    values = torch.empty(end - start, dtype=dtype)
    reader.read_into(values, stored, start)
    return values


def _put(piece: Tensor, at: int, share: Tensor, start: int) -> None:
    """Copy what overlaps: `piece` begins at the flat element `at`, `share` at `start`."""
    low, high = max(start, at), min(start + share.numel(), at + piece.numel())
    if low < high:
        share[low - start : high - start].copy_(piece[low - at : high - at])
