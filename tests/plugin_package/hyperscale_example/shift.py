"""An adapter kind is a pure function of what passes a site and of the site's weights."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from hyperscale.model.adapters.kinds import Place, TensorSpec
from hyperscale.model.adapters.linear import sample_vector
from hyperscale_example.register import ShiftSettings


@dataclass(frozen=True)
class Shift:
    """One vector for every site, 0 at the start."""

    settings: ShiftSettings
    name = "shift"
    is_generated = True

    @property
    def targets(self) -> tuple[str, ...]:
        return self.settings.targets

    def acts_on(self, target: str) -> Place:
        return "projections"

    def tensors(self, in_features: int, out_features: int) -> Mapping[str, TensorSpec]:
        return {"shift": TensorSpec((out_features,), "zero", scale=self.settings.scale)}

    def apply(self, x: Tensor, y: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        return y + sample_vector(weights["shift"])
