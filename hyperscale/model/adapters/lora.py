"""LoRA (arXiv 2106.09685): `y + (alpha / rank) · B A x`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from hyperscale.config.adaptation import LoraSettings
from hyperscale.model.adapters.kinds import TensorSpec
from hyperscale.model.adapters.linear import sample_linear


@dataclass(frozen=True)
class Lora:
    """Low-rank update of a projection; B starts at 0, so the update does too."""

    settings: LoraSettings
    name = "lora"
    acts_on: Literal["projections"] = "projections"

    @property
    def targets(self) -> tuple[str, ...]:
        return self.settings.targets

    def tensors(self, in_features: int, out_features: int) -> Mapping[str, TensorSpec]:
        """A [R, in] normal, B [out, R] zero with alpha / rank folded in."""
        rank = self.settings.rank
        return {
            "a": TensorSpec((rank, in_features), "normal"),
            "b": TensorSpec((out_features, rank), "zero", scale=self.settings.alpha / rank),
        }

    def apply(self, x: Tensor, y: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        return y + sample_linear(sample_linear(x, weights["a"]), weights["b"])
