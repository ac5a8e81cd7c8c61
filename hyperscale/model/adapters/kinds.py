"""What an adapter kind is: a pure function of what passes a site and of the site's generated weights.

Legend for shapes: B batch, T tokens, K tasks, S sites, R rank or bottleneck width, P prefix length.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

Place = Literal["projections", "sublayers", "inputs", "norms", "keys", "values"]
"""Where in a block a target is looked up, and what is adapted there: a linear layer's output, that of a sub-layer's
last linear layer, what goes into that layer, a layer norm's output, or the keys or the values of a self-attention."""

Start = Literal["zero", "normal", "adapter", "adapter_bias", "lora_a", "lora_b"]
"""How a tensor begins; generators/starts.py says what each means for stored and for generated tensors."""


@dataclass(frozen=True)
class TensorSpec:
    """One generated tensor of a site."""

    shape: tuple[int, ...]
    start: Start
    """`zero`: exactly 0 before the first step; `normal`: N(0, 1 / fan_in); the others are published starts."""
    published: Start | None = None
    """The start of `adaptation.init: paper`, where it is another."""
    scale: float = 1.0
    """Constant factor on what is learned, applied by the generator, so that `apply` and exported files need none."""

    def scaled(self, learned: Tensor) -> Tensor:
        """Return what the adapter gets; a factor of 1 costs no pass over what may be gigabytes."""
        return learned if self.scale == 1.0 else learned * self.scale

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def fan_in(self) -> int:
        """Length of the last dimension."""
        return self.shape[-1]


class AdapterKind(Protocol):
    """A family of adapters; instances carry their settings, never weights."""

    @property
    def name(self) -> str: ...

    @property
    def targets(self) -> tuple[str, ...]: ...

    @property
    def is_generated(self) -> bool:
        """Whether the generator makes its weights, rather than keeping them as parameters beside it."""
        ...

    def acts_on(self, target: str) -> Place:
        """Return which places of the architecture table `target` is one of."""
        ...

    def tensors(self, in_features: int, out_features: int) -> Mapping[str, TensorSpec]:
        """Return the generated tensors of a site with these sizes."""
        ...

    def apply(self, x: Tensor, y: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """Return what takes the place of `y` at a site.

        Args:
            x: what goes into the layer, [B, T, in_features]; for a norm, what its weight multiplies.
            y: what comes out of it, [B, T, out_features]; for inputs what goes in, for keys and values
                [B, heads, T, width / heads]; `x` is then the same tensor.
            weights: per name of `tensors` either one task's tensor for the whole batch (the spec's shape) or one per
                sample (with a leading B).
        """
        ...
