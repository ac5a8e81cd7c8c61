"""(IA)³ (arXiv 2205.05638, section 3.3): keys, values and inner activations times learned vectors, `(1 + δ) ⊙ y`."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from hyperscale.config.adaptation import Ia3Settings
from hyperscale.model.adapters.kinds import Place, TensorSpec
from hyperscale.model.adapters.linear import sample_vector

INNER = "feed_forward"
"""The target for the input of the feed-forward's last projection; every other target is a projection's output."""


@dataclass(frozen=True)
class Ia3:
    """One scale per feature; δ starts at 0."""

    settings: Ia3Settings
    name = "ia3"
    is_generated = True

    @property
    def targets(self) -> tuple[str, ...]:
        return self.settings.targets

    def acts_on(self, target: str) -> Place:
        return "inputs" if target == INNER else "projections"

    def tensors(self, in_features: int, out_features: int) -> Mapping[str, TensorSpec]:
        """δ [out]."""
        return {"delta": TensorSpec((out_features,), "zero")}

    def apply(self, x: Tensor, y: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        return y + y * sample_vector(weights["delta"])
