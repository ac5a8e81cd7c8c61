"""Frozen linear layers whose weights are stored in four bits (`codes.py`)."""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from hyperscale.model.quantized.codes import (
    BLOCK,
    GROUP,
    FourBitKind,
    FourBits,
    absmax_table,
    dequantize,
    quantize,
    shapes_of,
    table_of,
)

ABSMAX, SCALE = "weight_absmax", "weight_scale"


class FourBitLinear(nn.Linear):
    """`W x + b`, where W [out, in] is dequantized for each product and dropped after it.

    `weight`, `weight_absmax` and `weight_scale` are the three tensors of `FourBits`: frozen integers, which ZeRO-3
    shards and gathers like any other parameter. The backward pass dequantizes again; it keeps neither W nor the input.
    """

    weight_absmax: nn.Parameter
    weight_scale: nn.Parameter

    def __init__(self, linear: nn.Linear, stored: FourBits, kind: FourBitKind) -> None:
        nn.Module.__init__(self)  # nn.Linear's own __init__ creates a trainable weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.kind = kind
        # int8, although the bits are unsigned: T5 casts its states to the dtype of any other weight.
        self.weight = nn.Parameter(stored.codes, requires_grad=False)
        self.weight_absmax = nn.Parameter(stored.absmax, requires_grad=False)
        self.weight_scale = nn.Parameter(stored.scale, requires_grad=False)
        self.bias = linear.bias

    def forward(self, input: Tensor) -> Tensor:
        if torch.is_grad_enabled() and input.requires_grad:
            y: Tensor = _Product.apply(input, self)  # type: ignore[no-untyped-call]
            return y
        return F.linear(input, self.dequantized(input.dtype), self.bias)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """Return W [out, in] in `dtype`."""
        stored = FourBits(self.weight.detach(), self.weight_absmax.detach(), self.weight_scale.detach())
        shape = torch.Size((self.out_features, self.in_features))
        if self.kind == "nf4" and stored.codes.is_cuda and _bitsandbytes() is not None:
            return dequantize_with_bitsandbytes(stored, shape, dtype)
        return dequantize(stored, self.kind, shape, dtype)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: FourBitLinear) -> Tensor:
        ctx.linear = linear
        return F.linear(x, linear.dequantized(x.dtype), linear.bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.matmul(ctx.linear.dequantized(gradient.dtype)), None


def four_bits_of(linear: nn.Linear, kind: FourBitKind) -> FourBitLinear:
    """Return the layer with its weight in four bits; on the meta device, with the shapes of the stored tensors."""
    weight = linear.weight.detach()
    stored = shapes_of(weight.numel()) if weight.is_meta else quantize(weight, kind)
    return FourBitLinear(linear, stored, kind)


def dequantize_with_bitsandbytes(stored: FourBits, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Return an NF4 weight by bitsandbytes' kernel, which must be installed. On CUDA we have not run it."""
    functional: Any = _bitsandbytes()
    device = stored.codes.device
    scale = stored.scale.view(torch.float32)
    groups = functional.QuantState(absmax=scale[:-1], code=absmax_table(device), blocksize=GROUP, dtype=torch.float32)
    state = functional.QuantState(
        absmax=stored.absmax.view(torch.uint8),
        shape=shape,
        dtype=dtype,
        blocksize=BLOCK,
        code=table_of("nf4", device),
        quant_type="nf4",
        offset=scale[-1],
        state2=groups,
    )
    weight: Tensor = functional.dequantize_4bit(stored.codes.view(torch.uint8), state)
    return weight.view(shape)


@cache
def _bitsandbytes() -> Any:
    """Return bitsandbytes' functions, or None where it is not installed."""
    try:
        from bitsandbytes import functional  # noqa: PLC0415 (it is optional, and its import takes a second)
    except ImportError:
        return None
    return functional
