"""Linear maps and vectors, either one for the batch or one per sample."""

import torch
from torch import Tensor
from torch.nn import functional as F


def sample_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `x Wᵀ + b`.

    Args:
        x: [B, T, in].
        weight: [out, in] for the whole batch or [B, out, in] per sample.
        bias: [out] or [B, out], matching `weight`.
    """
    if weight.dim() == 2:
        return F.linear(x, weight, bias)
    product = torch.bmm(x, weight.transpose(1, 2))
    return product if bias is None else product + bias.unsqueeze(1)


def sample_vector(vector: Tensor) -> Tensor:
    """Return [out] unchanged and [B, out] as [B, 1, out], which broadcasts over tokens [B, T, out]."""
    return vector if vector.dim() == 1 else vector.unsqueeze(1)
