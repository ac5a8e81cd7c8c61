"""Trained norms of a frozen backbone: every norm computes with the weight `w + δ`.

The norm's own weight never changes: it is frozen, and under ZeRO-3 its tensor is empty between uses.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from hyperscale.config.adaptation import NormDeltaSettings
from hyperscale.model.adapters.kinds import Place, TensorSpec
from hyperscale.model.families.table import NORMS


@dataclass(frozen=True)
class NormDelta:
    """One difference for each weight of each norm; it starts at 0."""

    settings: NormDeltaSettings
    name = "norm_delta"
    is_generated = False
    targets = (*NORMS, "final")

    def acts_on(self, target: str) -> Place:
        return "norms"

    def tensors(self, in_features: int, out_features: int) -> Mapping[str, TensorSpec]:
        """δ [out]."""
        return {"delta": TensorSpec((out_features,), "zero")}

    def apply(self, x: Tensor, y: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        return y + weights["delta"]
