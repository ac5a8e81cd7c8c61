"""What an adapter kind is: a pure function of a site's input, output and generated weights.

Legend for shapes: B batch, T tokens, K tasks, S sites, R rank or bottleneck width.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor


@dataclass(frozen=True)
class TensorSpec:
    """One generated tensor of a site."""

    shape: tuple[int, ...]
    start: Literal["zero", "normal"]
    """`zero`: exactly 0 before the first step; `normal`: N(0, 1 / fan_in)."""
    scale: float = 1.0
    """Constant factor on what is learned, applied by the generator, so that `apply` and exported files need none."""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def std(self) -> float:
        """Standard deviation at the start: 1 / sqrt(last dimension) for `normal`, 0 for `zero`."""
        return 0.0 if self.start == "zero" else self.shape[-1] ** -0.5


class AdapterKind(Protocol):
    """A family of adapters; instances carry their settings, never weights."""

    @property
    def name(self) -> str: ...

    @property
    def acts_on(self) -> Literal["projections", "sublayers"]:
        """Which places of the architecture table `targets` names."""
        ...

    @property
    def targets(self) -> tuple[str, ...]: ...

    def tensors(self, in_features: int, out_features: int) -> Mapping[str, TensorSpec]:
        """Return the generated tensors of a site with these sizes."""
        ...

    def apply(self, x: Tensor, y: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """Return the adapted output of a site.

        Args:
            x: the linear layer's input, [B, T, in_features].
            y: its output, [B, T, out_features].
            weights: per name of `tensors` either one task's tensor for the whole batch (the spec's shape) or one per
                sample (with a leading B).
        """
        ...
