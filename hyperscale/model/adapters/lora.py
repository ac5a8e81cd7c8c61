"""LoRA (arXiv 2106.09685): `y + s B A x`, where s is alpha / rank, or alpha / √rank (arXiv 2312.03732)."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from hyperscale.config.adaptation import LoraSettings
from hyperscale.model.adapters.kinds import Place, TensorSpec
from hyperscale.model.adapters.linear import sample_linear


@dataclass(frozen=True)
class Lora:
    """Low-rank update of a projection; B starts at 0, so the update does too."""

    settings: LoraSettings
    name = "lora"
    is_generated = True

    @property
    def targets(self) -> tuple[str, ...]:
        return self.settings.targets

    def acts_on(self, target: str) -> Place:
        return "projections"

    def tensors(self, in_features: int, out_features: int) -> Mapping[str, TensorSpec]:
        """A [R, in] normal, B [out, R] zero with the scale folded in."""
        rank = self.settings.rank
        return {
            "a": TensorSpec((rank, in_features), "normal", "lora_a"),
            "b": TensorSpec((out_features, rank), "zero", "lora_b", scale=self.settings.scale),
        }

    def apply(self, x: Tensor, y: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        return y + sample_linear(sample_linear(x, weights["a"]), weights["b"])
