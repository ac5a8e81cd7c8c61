"""Bottleneck adapter with an internal skip (arXiv 1902.00751, section 2.1): `y + U act(D y + b_d) + b_u`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from hyperscale.config.adaptation import BottleneckSettings
from hyperscale.model.adapters.kinds import TensorSpec
from hyperscale.model.adapters.linear import sample_linear

_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


@dataclass(frozen=True)
class Bottleneck:
    """Two small dense layers on a sub-layer's output; U and b_u start at 0."""

    settings: BottleneckSettings
    name = "bottleneck"
    acts_on: Literal["sublayers"] = "sublayers"

    @property
    def targets(self) -> tuple[str, ...]:
        return self.settings.targets

    def tensors(self, in_features: int, out_features: int) -> Mapping[str, TensorSpec]:
        """D [R, out], b_d [R], U [out, R], b_u [out], where `out` is the width of the sub-layer's output."""
        width = max(1, out_features // self.settings.reduction)
        return {
            "down": TensorSpec((width, out_features), "normal"),
            "down_bias": TensorSpec((width,), "zero"),
            "up": TensorSpec((out_features, width), "zero"),
            "up_bias": TensorSpec((out_features,), "zero"),
        }

    def apply(self, x: Tensor, y: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        hidden = _ACTIVATIONS[self.settings.activation](sample_linear(y, weights["down"], weights["down_bias"]))
        return y + sample_linear(hidden, weights["up"], weights["up_bias"])
