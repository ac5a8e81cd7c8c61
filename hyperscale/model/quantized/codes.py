"""Four-bit codes of frozen weights, with scales that are quantized too: the numbers of bitsandbytes.

The flat weight is cut into blocks of 64 values. Each value is a number of a table times the block's largest magnitude
(absmax). The absmax values are stored in 8 bits themselves: their mean, which is the offset, is subtracted, and blocks
of 256 of the rest share one fp32 scale ("double quantization" of QLoRA, arXiv:2305.14314). A weight takes
4 + 8/64 + 32/(64 · 256) = 4.127 bits.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

FourBitKind = Literal["nf4", "int4"]

BLOCK = 64
"""Weights that share one absmax."""
GROUP = 256
"""Absmax values that share one scale."""
SPAN = BLOCK * GROUP
"""Weights of a group."""
_CHUNK = 256 * 1024
"""Weights that are fp32 at one time while a tensor is dequantized on a CPU: 1 MiB."""
_CHUNK_CUDA = 4 * 1024 * 1024
"""The same on other devices, where each chunk costs launches."""
_LAST_STEP = 65535
_SMALLEST = 1e-38
"""Stands for the absmax of a block of zeros."""

_TABLES: dict[str, tuple[float, ...]] = {
    # Table 4 of QLoRA, appendix E: quantiles of a normal distribution, scaled to [-1, 1], with an exact 0.
    "nf4": (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
    # Integers from -7 to 7 as sevenths of the absmax. No weight is rounded to -8.
    "int4": tuple(step / 7 for step in range(-8, 8)),
}


class FourBits(NamedTuple):
    """A quantized tensor of n weights, as it is stored."""

    codes: Tensor
    """[⌈n/2⌉, 1] int8: two codes a byte, the first in the high half."""
    absmax: Tensor
    """[⌈n/64⌉] int8: the bits of unsigned indices into `absmax_table`."""
    scale: Tensor
    """[⌈n/64/256⌉ + 1] int32: the bits of fp32 numbers, one scale a group and the offset last. Integers survive a cast
    of all floating-point parameters of a model."""


def shapes_of(numel: int) -> FourBits:
    """Return the tensors of `numel` weights without memory, on the meta device."""
    blocks = num_blocks(numel)
    return FourBits(
        torch.empty(-(-numel // 2), 1, dtype=torch.int8, device="meta"),
        torch.empty(blocks, dtype=torch.int8, device="meta"),
        torch.empty(-(-blocks // GROUP) + 1, dtype=torch.int32, device="meta"),
    )


def num_blocks(numel: int) -> int:
    """Return the number of absmax values of `numel` weights."""
    return -(-numel // BLOCK)


def quantize(weight: Tensor, kind: FourBitKind) -> FourBits:
    """Quantize a whole tensor on the CPU; `dequantize` is the way back."""
    codes, absmax = encode(weight.reshape(-1), kind)
    offset = mean_absmax(absmax)
    indices, scales = compress(absmax, offset)
    return FourBits(codes.unsqueeze(1), indices, scale_bits(scales, offset))


def encode(values: Tensor, kind: FourBitKind) -> tuple[Tensor, Tensor]:
    """Return the codes int8 [⌈n/2⌉] and the absmax fp32 [⌈n/64⌉] of flat values [n], which begin with a block.

    The last block of a tensor may be shorter. bitsandbytes divides by its absmax and multiplies by the others'
    reciprocals, which now and then rounds to another number.
    """
    values = values.float()
    rest = values.numel() % BLOCK
    full = values[: values.numel() - rest].view(-1, BLOCK)
    absmax = full.abs().amax(dim=1)
    scaled = (full * (1.0 / absmax.clamp(min=_SMALLEST)).unsqueeze(1)).flatten()
    if rest:
        last = values[-rest:].abs().amax().clamp(min=_SMALLEST)
        absmax = torch.cat([absmax, last.unsqueeze(0)])
        scaled = torch.cat([scaled, values[-rest:] / last])
    if scaled.numel() % 2:
        scaled = F.pad(scaled, (0, 1))
    codes = torch.bucketize(scaled.clamp_(-1, 1), _boundaries(kind), out_int32=True).to(torch.uint8)
    return ((codes[::2] << 4) | codes[1::2]).view(torch.int8), absmax


def mean_absmax(absmax: Tensor) -> Tensor:
    """Return the offset of a tensor's absmax values, as a scalar; the same with any number of threads."""
    with _one_thread():
        return absmax.mean()


def compress(absmax: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Return the indices int8 [n] and the scales fp32 [⌈n/256⌉] of absmax values [n], which begin with a group.

    As bitsandbytes does on CPUs, a value is rounded to one of 65,536 steps first; a group of zeros has indices 0.
    """
    groups = in_groups(absmax, offset)
    scales = group_scales(groups)
    normed = groups / scales.clamp(min=_SMALLEST).unsqueeze(1)
    steps = ((normed + 1) * 0.5 * _LAST_STEP + 0.5).int()
    indices = _nearest()[steps].masked_fill_((scales == 0).unsqueeze(1), 0).flatten()
    return indices[: len(absmax)].view(torch.int8), scales


def in_groups(absmax: Tensor, offset: Tensor) -> Tensor:
    """Return absmax values [n] less the offset as [⌈n/256⌉, 256], filled up with zeros."""
    return F.pad(absmax - offset, (0, -len(absmax) % GROUP)).view(-1, GROUP)


def group_scales(groups: Tensor) -> Tensor:
    """Return the scale fp32 [k] of each group [k, 256]."""
    return groups.abs().amax(dim=1)


def scale_bits(scales: Tensor, offset: Tensor) -> Tensor:
    """Return `FourBits.scale` of scales fp32 [k] and an offset."""
    return torch.cat([scales, offset.reshape(1)]).view(torch.int32)


def part_of(stored: FourBits, start: int, end: int) -> FourBits:
    """Return views of what the weights from `start` to `end` need; `start` begins a group, `SPAN` weights each."""
    groups = stored.scale[start // SPAN : -(-end // SPAN)]
    return FourBits(
        stored.codes[start // 2 : -(-end // 2)],
        stored.absmax[start // BLOCK : num_blocks(end)],
        torch.cat([groups, stored.scale[-1:]]),
    )


def absmax_of(stored: FourBits) -> Tensor:
    """Return the absmax fp32 [⌈n/64⌉] that the stored indices stand for."""
    scale = stored.scale.view(torch.float32)
    values = F.embedding(stored.absmax.view(torch.uint8).int(), absmax_table(stored.absmax.device).unsqueeze(1))
    groups = F.pad(values.view(-1), (0, -len(values) % GROUP)).view(-1, GROUP)
    return (groups * scale[:-1].unsqueeze(1)).flatten()[: len(values)] + scale[-1]


def dequantize(stored: FourBits, kind: FourBitKind, numel: int, dtype: torch.dtype) -> Tensor:
    """Return the flat weight [n] in `dtype`; products are fp32 and rounded once. Chunks keep fp32 copies small."""
    absmax = absmax_of(stored)
    pairs = _pairs(kind, stored.codes.device)
    codes = stored.codes.view(torch.uint8).view(-1)
    weight = torch.empty(numel, dtype=dtype, device=codes.device)
    chunk = _CHUNK if codes.is_cpu else _CHUNK_CUDA
    # On the meta device one chunk shows what all take.
    for start in range(0, min(numel, chunk) if codes.is_meta else numel, chunk):
        end = min(start + chunk, numel)
        values = F.embedding(codes[start // 2 : -(-end // 2)].int(), pairs).view(-1)[: end - start]
        full = (end - start) // BLOCK * BLOCK
        scales = absmax[start // BLOCK : num_blocks(end)]
        values[:full].view(-1, BLOCK).mul_(scales[: full // BLOCK].unsqueeze(1))
        values[full:].mul_(scales[full // BLOCK :])
        weight[start:end].copy_(values)
    return weight


def dequantize_rows(stored: FourBits, kind: FourBitKind, rows: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Return some rows [n, width] of a weight whose rows have `width` weights; `rows` [n] are their numbers."""
    scale = stored.scale.view(torch.float32)
    flat = rows.unsqueeze(1) * width
    blocks = flat // BLOCK + torch.arange(width // BLOCK, device=rows.device)  # [n, width / 64]
    indices = stored.absmax.view(torch.uint8)[blocks].int()
    absmax = absmax_table(rows.device)[indices] * scale[:-1][blocks // GROUP] + scale[-1]
    codes = stored.codes.view(torch.uint8).view(-1, width // 2)[rows].int()
    values = F.embedding(codes, _pairs(kind, rows.device)).view(len(rows), -1, BLOCK)
    return values.mul_(absmax.unsqueeze(2)).flatten(1).to(dtype)


@cache
def table_of(kind: FourBitKind, device: torch.device | str = "cpu") -> Tensor:
    """Return the 16 numbers that codes stand for, ascending, fp32."""
    return torch.tensor(_TABLES[kind], dtype=torch.float32, device=device)


@cache
def _boundaries(kind: FourBitKind) -> Tensor:
    table = table_of(kind)
    return (table[:-1] + table[1:]) / 2


@cache
def _pairs(kind: FourBitKind, device: torch.device) -> Tensor:
    """Return both numbers of every byte: [256, 2]."""
    table = table_of(kind)
    return torch.stack([table.repeat_interleave(16), table.repeat(16)], dim=1).to(device)


@cache
def absmax_table(device: torch.device | str = "cpu") -> Tensor:
    """Return the 256 numbers in [-1, 1] that 8-bit absmax values stand for, ascending (arXiv:1511.04561).

    The more exponent a number has, the fewer bits are left for its fraction: of each sign 2^i numbers lie evenly
    between 10^(i-7) and 10^(i-6), for i from 0 to 6; 0 and 1 are added.
    """
    positive: list[float] = []
    for exponent in range(7):
        bounds = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        positive += (10.0 ** (exponent - 6) * ((bounds[:-1] + bounds[1:]) / 2)).tolist()
    return torch.tensor(sorted([*(-one for one in positive), 0.0, *positive, 1.0]), dtype=torch.float32, device=device)


@cache
def _nearest() -> Tensor:
    """Return the index of the number in `absmax_table` nearest to each step from -1 to 1: uint8 [65536]."""
    table = absmax_table()
    steps = torch.arange(_LAST_STEP + 1).float() / _LAST_STEP * 2 - 1
    right = torch.bucketize(steps, table).clamp_(1, len(table) - 1)
    is_right = (table[right] - steps).abs() < (steps - table[right - 1]).abs()
    return torch.where(is_right, right, right - 1).to(torch.uint8)


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
