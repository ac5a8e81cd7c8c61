"""How tensors begin: those that are stored as parameters, and those that a head makes from a code.

| start | stored | made by a head | source |
|---|---|---|---|
| zero | 0 | weight 0, bias 0 | |
| normal | N(0, 1 / fan_in) | weight N(0, 0.01²), bias N(0, 1 / fan_in) | |
| adapter | N(0, 0.001²) cut at two deviations | weight N(0, 0.01²), bias 0 | Houlsby et al., HyperFormer's code |
| adapter_bias | 0 | the same | the same |
| lora_a | U(±1 / √fan_in) | weight U(±1 / √E), no bias | LoRA's and HyperLoader's code (Kaiming, a = √5) |
| lora_b | 0 | weight 0, no bias | the same |

A `normal` tensor of a head is carried by the bias, so that tasks start alike and rank-wide. Where a tensor has a scale,
what is learned starts divided by it: the table says what the adapter gets.
"""

from torch import Tensor, nn

from hyperscale.model.adapters.kinds import TensorSpec

HEAD_STD = 0.01
"""Standard deviation of a head's weights, and of the paper's trunk (HyperFormer's released value)."""
_ADAPTER_STD = 1e-3


def start_stored(tensor: Tensor, spec: TensorSpec) -> None:
    """Fill a tensor [.., *shape] of stored weights."""
    match spec.start:
        case "normal":
            nn.init.normal_(tensor, std=spec.fan_in**-0.5 / spec.scale)
        case "adapter":
            nn.init.trunc_normal_(tensor, std=_ADAPTER_STD, a=-2 * _ADAPTER_STD, b=2 * _ADAPTER_STD)
        case "lora_a":
            nn.init.uniform_(tensor, -(spec.fan_in**-0.5), spec.fan_in**-0.5)
        case "zero" | "adapter_bias" | "lora_b":
            nn.init.zeros_(tensor)


def head_has_bias(spec: TensorSpec) -> bool:
    """Return whether a head for this tensor has a bias."""
    return spec.start not in ("lora_a", "lora_b")


def start_head(weight: Tensor, bias: Tensor | None, spec: TensorSpec) -> None:
    """Fill a head's weight [.., numel, E] and bias [.., numel]."""
    match spec.start:
        case "zero" | "lora_b":
            nn.init.zeros_(weight)
        case "lora_a":
            nn.init.uniform_(weight, -(weight.shape[-1] ** -0.5), weight.shape[-1] ** -0.5)
        case "normal" | "adapter" | "adapter_bias":
            nn.init.normal_(weight, std=HEAD_STD / spec.scale)
    if bias is not None:
        start_bias(bias, spec)


def start_bias(bias: Tensor, spec: TensorSpec) -> None:
    """Fill what a head adds to its product, [.., numel] or [.., *shape]: a head's own bias, or that of a site."""
    if spec.start == "normal":
        nn.init.normal_(bias, std=spec.fan_in**-0.5 / spec.scale)
    else:
        nn.init.zeros_(bias)


def start_trunk(trunk: nn.Module) -> None:
    """Give a trunk the start of HyperFormer's code: linear layers N(0, 0.01²) without bias."""
    for layer in trunk.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=HEAD_STD)
            nn.init.zeros_(layer.bias)
