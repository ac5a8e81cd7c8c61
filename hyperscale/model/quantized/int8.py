"""Frozen linear layers whose weights are stored as 8-bit integers, with one scale per output.

Weight-only, symmetric, round to nearest: q = round(W / s), where s = max |row| / 127 is rounded up to a value of the
backbone's dtype. Then |W - s q| <= s / 2 in every dtype, and q is exact in bf16 because it is small.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

SCALE = "weight_scale"
_LARGEST = 127


class Int8Linear(nn.Linear):
    """`s ⊙ (q x) + b` in place of `W x + b`; q is `weight`, int8 [out, in], s is `weight_scale`, [out].

    Both are frozen parameters, so ZeRO-3 shards and gathers them like any other. A product casts the weight and drops
    the cast afterwards: the backward pass keeps neither it nor the input.
    """

    weight_scale: nn.Parameter

    def __init__(self, linear: nn.Linear, weight: Tensor, scale: Tensor) -> None:
        nn.Module.__init__(self)  # nn.Linear's own __init__ creates a trainable weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)
        self.bias = linear.bias

    def forward(self, input: Tensor) -> Tensor:
        if torch.is_grad_enabled() and input.requires_grad:
            y: Tensor = _Int8Product.apply(input, self)  # type: ignore[no-untyped-call]
            return y
        return _product(input, self)


def _product(x: Tensor, linear: Int8Linear) -> Tensor:
    y = F.linear(x, linear.weight.to(x.dtype)).mul_(linear.weight_scale)
    bias: Tensor | None = linear.bias
    return y if bias is None else y.add_(bias)


class _Int8Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: Int8Linear) -> Tensor:
        ctx.linear = linear
        return _product(x, linear)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        linear: Int8Linear = ctx.linear
        return (gradient * linear.weight_scale).matmul(linear.weight.to(gradient.dtype)), None


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return q int8 [N, in] and s [N] of rows [N, in]; s in the rows' dtype. A row of zeros has s = 1."""
    rows = weight.float()
    exact = rows.abs().amax(dim=1) / _LARGEST
    scale = exact.to(weight.dtype)
    scale = torch.where(scale.float() < exact, torch.nextafter(scale, torch.full_like(scale, torch.inf)), scale)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return torch.round(rows / scale.float().unsqueeze(1)).to(torch.int8), scale


def int8_of(linear: nn.Linear) -> Int8Linear:
    """Return the layer with its weight as integers; on the meta device, with their shapes."""
    weight = linear.weight.detach()
    if weight.is_meta:
        scale = torch.empty(linear.out_features, dtype=weight.dtype, device="meta")
        return Int8Linear(linear, torch.empty_like(weight, dtype=torch.int8), scale)
    return Int8Linear(linear, *quantize(weight))
