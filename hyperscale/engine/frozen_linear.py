"""A linear layer with a frozen weight that ZeRO-3 may release between the forward and the backward pass."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class _FrozenLinear(torch.autograd.Function):
    """`x Wᵀ + b` that keeps neither `x`, which only the gradient of W would need, nor a view of W.

    PyTorch's own linear keeps `W.t()`: a view, whose storage outlives the release of the parameter, so that every
    gathered block would stay until its backward pass. DeepSpeed's replacement keeps `x` as well.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: nn.Linear) -> Tensor:
        ctx.linear = linear
        return F.linear(x, linear.weight, linear.bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None
        return gradient.matmul(ctx.linear.weight), None


def forget_linear_inputs(backbone: nn.Module) -> None:
    """Let every linear layer of a frozen backbone run as above; the weights must be gathered in the backward pass."""
    for module in backbone.modules():
        if type(module) is nn.Linear:
            module.forward = partial(_run, module)  # type: ignore[method-assign]


def _run(linear: nn.Linear, x: Tensor) -> Tensor:
    if not torch.is_grad_enabled() or not x.requires_grad:
        return F.linear(x, linear.weight, linear.bias)
    y: Tensor = _FrozenLinear.apply(x, linear)  # type: ignore[no-untyped-call]
    return y
