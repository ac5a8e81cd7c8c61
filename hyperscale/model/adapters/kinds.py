"""The interface of an adapter kind: a pure function of a site's activations and its generated weights.

Legend for shapes: B batch, T tokens, K tasks, S sites, R rank or bottleneck width, P prefix length.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from torch import Tensor

Place = Literal["projections", "sublayers", "inputs", "norms", "keys", "values"]
"""The part of a block where a target is looked up, and what is adapted there: a linear layer's output, the output or
the input of a sub-layer's last linear layer, a norm's weight, or the keys or values of a self-attention."""

ALL = "all"
"""The target that stands for every entry of its place in the family's table which a block has."""

Start = Literal["zero", "normal", "adapter", "adapter_bias", "lora_a", "lora_b"]
"""Initial values of a tensor; generators/starts.py defines each for stored and for generated tensors."""


@dataclass(frozen=True)
class TensorSpec:
    """One generated tensor of a site."""

    shape: tuple[int, ...]
    start: Start
    """`zero`: exactly 0 before the first step; `normal`: N(0, 1 / fan_in); the others are published starts."""
    published: Start | None = None
    """The start with `adaptation.init: paper`, if it differs."""
    scale: float = 1.0
    """Constant factor that the generator applies, so that `apply` and exported files need none."""

    def scaled(self, learned: Tensor) -> Tensor:
        """Return the scaled tensor; a factor of 1 skips a pass over what may be gigabytes."""
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
    def targets(self) -> tuple[str, ...]:
        """Entries of the family's table, or `ALL`."""
        ...

    @property
    def is_generated(self) -> bool:
        """Whether the generator computes its weights; otherwise they are stored parameters."""
        ...

    def acts_on(self, target: str) -> Place:
        """Return the kind of place that `target` is in the architecture table."""
        ...

    def tensors(self, in_features: int, out_features: int) -> Mapping[str, TensorSpec]:
        """Return the generated tensors of a site with these sizes."""
        ...

    def apply(self, x: Tensor, y: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """Return the tensor that replaces `y` at a site.

        Args:
            x: the layer's input [B, T, in_features].
            y: the layer's output [B, T, out_features]. For inputs it is the input, for keys and values
                [B, heads, T, width / heads], and for a norm its weight [D], or [B, D] after another kind; in these
                cases `x` is the same tensor.
            weights: for each name of `tensors`, either one task's tensor for the whole batch (the spec's shape) or one
                tensor per sample (with a leading B).
        """
        ...


@runtime_checkable
class SharesConstants(Protocol):
    """A kind whose sites share frozen tensors that no generator makes and no checkpoint stores."""

    def constants(self, sizes: Sequence[tuple[int, int]]) -> Mapping[str, Tensor]:
        """Return fp32 tensors on the CPU, the same in every process.

        `apply` gets them among its weights, in the dtype of these, and always without a leading B.

        Args:
            sizes: (in_features, out_features) of all of the kind's sites.
        """
        ...
