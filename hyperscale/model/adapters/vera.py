"""VeRA (arXiv 2310.11454): `y + b ⊙ B(d ⊙ A x)`. A and B are random, frozen, and the same at all sites."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from hyperscale.config.adaptation import VeraSettings
from hyperscale.model.adapters.kinds import Place, TensorSpec
from hyperscale.model.adapters.linear import sample_vector


@dataclass(frozen=True)
class Vera:
    """Two vectors for each site; b starts at 0. d is `d_initial` plus what is generated, which starts at 0 too."""

    settings: VeraSettings
    name = "vera"
    is_generated = True

    @property
    def targets(self) -> tuple[str, ...]:
        return self.settings.targets

    def acts_on(self, target: str) -> Place:
        return "projections"

    def tensors(self, in_features: int, out_features: int) -> Mapping[str, TensorSpec]:
        """Return d [R], less `d_initial`, and b [out]."""
        return {"d": TensorSpec((self.settings.rank,), "zero"), "b": TensorSpec((out_features,), "zero")}

    def constants(self, sizes: Sequence[tuple[int, int]]) -> Mapping[str, Tensor]:
        """Return A [R, the widest input] and B [the widest output, R]; a site uses the first columns and rows.

        U(±√(6 / fan_in)) from one stream of random numbers, as PEFT draws them.
        """
        rank, stream = self.settings.rank, torch.Generator().manual_seed(self.settings.projection_seed)
        a = _uniform((rank, max(width for width, _ in sizes)), stream)
        return {"shared_a": a, "shared_b": _uniform((max(width for _, width in sizes), rank), stream)}

    def apply(self, x: Tensor, y: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        a, b = weights["shared_a"][:, : x.shape[-1]], weights["shared_b"][: y.shape[-1]]
        hidden = F.linear(x, a) * sample_vector(self.settings.d_initial + weights["d"])
        return y + F.linear(hidden, b) * sample_vector(weights["b"])


def _uniform(shape: tuple[int, int], stream: torch.Generator) -> Tensor:
    bound = math.sqrt(6 / shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=stream)
