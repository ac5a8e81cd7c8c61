"""Frozen linear layers and embeddings whose weights are stored in four bits (`codes.py`)."""

from collections.abc import Iterator
from functools import cache
from math import gcd
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from hyperscale.model.quantized.codes import (
    BLOCK,
    GROUP,
    SPAN,
    FourBitKind,
    FourBits,
    absmax_table,
    dequantize,
    dequantize_rows,
    part_of,
    quantize,
    shapes_of,
    table_of,
)

ABSMAX, SCALE = "weight_absmax", "weight_scale"
_SLAB_BYTES = 32 * 1024 * 1024
"""Of a weight that is dequantized at one time: of LLaMA-70B's 28,672 x 8,192, a fourteenth."""


class FourBitWeight(nn.Module):
    """Holds a weight of `num_rows` rows of `width` as the three tensors of `FourBits`.

    All are frozen integers, which ZeRO-3 shards and gathers like any other parameter.
    """

    weight_absmax: nn.Parameter
    weight_scale: nn.Parameter
    kind: FourBitKind
    num_rows: int
    width: int

    def store(self, stored: FourBits, kind: FourBitKind, num_rows: int, width: int) -> None:
        """Register the parameters; those that another layer has too stay the same objects."""
        self.kind, self.num_rows, self.width = kind, num_rows, width
        # int8, although the bits are unsigned: T5 casts its states to the dtype of any other weight.
        for name, tensor in zip(("weight", ABSMAX, SCALE), stored, strict=True):
            one = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
            self.register_parameter(name, one)

    @property
    def stored(self) -> FourBits:
        weight: Any = self.weight
        return FourBits(weight.detach(), self.weight_absmax.detach(), self.weight_scale.detach())

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """Return the weight [rows, width] in `dtype`."""
        return self._dequantized(slice(0, self.num_rows), dtype)

    def slabs(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Yield the weight a few rows at a time, each time with their place."""
        for start, end in self._slab_bounds(dtype.itemsize):
            yield slice(start, end), self._dequantized(slice(start, end), dtype)

    def _slab_bounds(self, itemsize: int) -> list[tuple[int, int]]:
        whole_groups = SPAN // gcd(self.width, SPAN)
        rows = max(1, _SLAB_BYTES // (self.width * itemsize) // whole_groups) * whole_groups
        return [(start, min(start + rows, self.num_rows)) for start in range(0, self.num_rows, rows)]

    def _dequantized(self, rows: slice, dtype: torch.dtype) -> Tensor:
        start, end = rows.start * self.width, rows.stop * self.width
        stored = self.stored if rows == slice(0, self.num_rows) else part_of(self.stored, start, end)
        if self.kind == "nf4" and stored.codes.is_cuda and _bitsandbytes() is not None:
            weight = dequantize_with_bitsandbytes(stored, end - start, dtype)
        else:
            weight = dequantize(stored, self.kind, end - start, dtype)
        return weight.view(-1, self.width)


class FourBitLinear(FourBitWeight, nn.Linear):
    """`W x + b`; W [out, in] is dequantized for each product, a slab of rows at a time, and dropped after it.

    The backward pass dequantizes again; it keeps neither W nor the input.
    """

    def __init__(self, linear: nn.Linear, stored: FourBits, kind: FourBitKind) -> None:
        nn.Module.__init__(self)  # nn.Linear's own __init__ creates a trainable weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.store(stored, kind, linear.out_features, linear.in_features)
        self.bias = linear.bias

    def forward(self, input: Tensor) -> Tensor:
        if torch.is_grad_enabled() and input.requires_grad:
            y: Tensor = _Product.apply(input, self)  # type: ignore[no-untyped-call]
            return y
        return self.product(input)

    def product(self, x: Tensor) -> Tensor:
        """Return the layer's output without a way back."""
        bias: Tensor | None = self.bias
        y = x.new_empty(*x.shape[:-1], self.out_features)
        for rows, weight in self.slabs(x.dtype):
            part = F.linear(x, weight, None if bias is None else bias[rows])
            if rows.stop - rows.start == self.out_features:
                return part
            y[..., rows] = part
        return y


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: FourBitLinear) -> Tensor:
        ctx.linear = linear
        return linear.product(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        linear: FourBitLinear = ctx.linear
        flat = gradient.reshape(-1, linear.out_features)
        result: Tensor | None = None
        for rows, weight in linear.slabs(gradient.dtype):
            part = flat[:, rows]
            result = part @ weight if result is None else result.addmm_(part, weight)
        assert result is not None
        return result.view(*gradient.shape[:-1], linear.in_features), None


class FourBitEmbedding(FourBitWeight, nn.Embedding):
    """Looks up rows and dequantizes them, never the whole weight."""

    def __init__(self, embedding: nn.Embedding, stored: FourBits, kind: FourBitKind) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        for name in ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"):
            setattr(self, name, getattr(embedding, name))
        self.dtype = embedding.weight.dtype
        self.store(stored, kind, embedding.num_embeddings, embedding.embedding_dim)

    def forward(self, input: Tensor) -> Tensor:
        rows = dequantize_rows(self.stored, self.kind, input.flatten(), self.width, self.dtype)
        return rows.view(*input.shape, self.width)


def four_bits_of(weight: Tensor, kind: FourBitKind) -> FourBits:
    """Return a weight in four bits; on the meta device, the shapes of the stored tensors."""
    weight = weight.detach()
    return shapes_of(weight.numel()) if weight.is_meta else quantize(weight, kind)


def dequantize_with_bitsandbytes(stored: FourBits, numel: int, dtype: torch.dtype) -> Tensor:
    """Return a flat NF4 weight [n] by bitsandbytes' kernel, which must be installed. We have not run it on CUDA."""
    functional: Any = _bitsandbytes()
    device = stored.codes.device
    scale = stored.scale.view(torch.float32)
    groups = functional.QuantState(absmax=scale[:-1], code=absmax_table(device), blocksize=GROUP, dtype=torch.float32)
    state = functional.QuantState(
        absmax=stored.absmax.view(torch.uint8),
        shape=torch.Size((numel,)),
        dtype=dtype,
        blocksize=BLOCK,
        code=table_of("nf4", device),
        quant_type="nf4",
        offset=scale[-1],
        state2=groups,
    )
    weight: Tensor = functional.dequantize_4bit(stored.codes.view(torch.uint8), state)
    return weight.view(-1)


@cache
def _bitsandbytes() -> Any:
    """Return bitsandbytes' functions, or None where it is not installed."""
    try:
        from bitsandbytes import functional  # noqa: PLC0415 (it is optional, and its import takes seconds)
    except ImportError:
        return None
    return functional
