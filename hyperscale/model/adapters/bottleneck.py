"""Bottleneck adapter with an internal skip (arXiv 1902.00751, section 2.1): `y + U act(D y + b_d) + b_u`.

With a conditional layer norm (arXiv 2106.04489, section 2.2): `y + γ ⊙ LN(U act(D y + b_d) + b_u) + β`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor
from torch.nn import functional as F

from hyperscale.config.adaptation import BottleneckSettings
from hyperscale.model.adapters.kinds import Place, TensorSpec
from hyperscale.model.adapters.linear import sample_linear, sample_vector

_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}
_NORM_EPS = 1e-5
"""PyTorch's default, which HyperFormer's code uses."""


@dataclass(frozen=True)
class Bottleneck:
    """Two small dense layers on a sub-layer's output. U and b_u start at 0; with a layer norm, γ and β do."""

    settings: BottleneckSettings
    name = "bottleneck"
    is_generated = True

    @property
    def targets(self) -> tuple[str, ...]:
        return self.settings.targets

    def acts_on(self, target: str) -> Place:
        return "sublayers"

    def tensors(self, in_features: int, out_features: int) -> Mapping[str, TensorSpec]:
        """D [R, out], b_d [R], U [out, R], b_u [out], γ [out], β [out]; `out` is the width of the sub-layer's output.

        If U and γ both started at 0, neither would ever get a gradient. With a layer norm, U therefore starts like D.
        """
        width = max(1, out_features // self.settings.reduction)
        dense = {
            "down": TensorSpec((width, out_features), "normal", "adapter"),
            "down_bias": TensorSpec((width,), "zero", "adapter_bias"),
            "up": TensorSpec((out_features, width), "normal" if self.settings.layer_norm else "zero", "adapter"),
            "up_bias": TensorSpec((out_features,), "zero", "adapter_bias"),
        }
        if not self.settings.layer_norm:
            return dense
        return dense | {
            "gamma": TensorSpec((out_features,), "zero", "adapter"),
            "beta": TensorSpec((out_features,), "zero", "adapter_bias"),
        }

    def apply(self, x: Tensor, y: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        hidden = _ACTIVATIONS[self.settings.activation](sample_linear(y, weights["down"], weights["down_bias"]))
        branch = sample_linear(hidden, weights["up"], weights["up_bias"])
        if self.settings.layer_norm:
            normalised = F.layer_norm(branch, branch.shape[-1:], eps=_NORM_EPS)
            branch = normalised * sample_vector(weights["gamma"]) + sample_vector(weights["beta"])
        return y + branch
