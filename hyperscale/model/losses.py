"""Cross-entropy that keeps no fp32 copy of the logits for the backward pass."""

from typing import Any

import torch
from torch import Tensor

_CHUNK_NUMEL = 4 * 1024 * 1024
"""How many logits are in fp32 at a time: 16 MiB."""


class CrossEntropy(torch.autograd.Function):
    """Exact cross-entropy [N] of logits [N, V], computed in fp32 over a few rows at a time.

    PyTorch's cross-entropy keeps `logits.float()` and its log-softmax: 12 bytes per logit on top of the 2 of bf16.
    This one keeps the logits in their dtype and one number per row. The backward pass computes the softmax again, in
    one pass over memory.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
        losses = logits.new_empty(len(logits), dtype=torch.promote_types(logits.dtype, torch.float32))
        normalisers = torch.empty_like(losses)
        for rows in _chunks(logits):
            part = logits[rows].to(losses.dtype)
            normalisers[rows] = part.logsumexp(-1)
            right = part.gather(1, targets[rows].unsqueeze(1)).squeeze(1)
            losses[rows] = normalisers[rows] - (1 - label_smoothing) * right
            if label_smoothing:
                losses[rows] -= label_smoothing * part.mean(-1)
        ctx.save_for_backward(logits, targets, normalisers)
        ctx.label_smoothing = label_smoothing
        return losses

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        logits, targets, normalisers = ctx.saved_tensors
        (gradient,) = gradients
        result = torch.empty_like(logits)
        for rows in _chunks(logits):
            part = logits[rows].to(normalisers.dtype, copy=True)  # a cast of fp32 logits would not copy them
            part.sub_(normalisers[rows].unsqueeze(1)).exp_()
            if ctx.label_smoothing:
                part.sub_(ctx.label_smoothing / logits.shape[1])
            right = part.new_full((1, 1), ctx.label_smoothing - 1).expand(len(part), 1)
            part.scatter_add_(1, targets[rows].unsqueeze(1), right)
            result[rows] = part.mul_(gradient[rows].unsqueeze(1))
        return result, None, None


def _chunks(logits: Tensor) -> list[slice]:
    num_rows, vocabulary = logits.shape
    size = max(1, _CHUNK_NUMEL // max(1, vocabulary))
    return [slice(start, start + size) for start in range(0, num_rows, size)]
