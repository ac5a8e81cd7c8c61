"""Trained layer norms of a frozen backbone: `(w + δ) ⊙ n` is computed as `y + δ ⊙ n`; n is the normalised input.

The norm's own weight never changes: it is frozen, and under ZeRO-3 its tensor is empty between uses.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hyperscale.config.adaptation import NormDeltaSettings
from hyperscale.model.adapters.kinds import Place, TensorSpec
from hyperscale.model.adapters.linear import sample_vector


@dataclass(frozen=True)
class NormDelta:
    """One difference for each weight of each norm; it starts at 0."""

    settings: NormDeltaSettings
    name = "norm_delta"
    is_generated = False
    targets = ("attention", "cross_attention", "feed_forward", "final")

    def acts_on(self, target: str) -> Place:
        return "norms"

    def tensors(self, in_features: int, out_features: int) -> Mapping[str, TensorSpec]:
        """δ [out]."""
        return {"delta": TensorSpec((out_features,), "zero")}

    def apply(self, x: Tensor, y: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        return y + x * sample_vector(weights["delta"])


def rms_normalised(x: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Return the normalised input [.., D] of an RMS norm: computed in fp32, then rounded to the weight's dtype.

    LLaMA's and T5's norms both compute it this way. Its product with their weight equals their output bit for bit.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (x * scale).to(dtype)
