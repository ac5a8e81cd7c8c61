"""Generated weights as they are: one tensor [S, …] per group of the site map and name. Expresses every adapter kind."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hyperscale.model.sites import SiteMap
from hyperscale.model.weights import Weights

TENSORS = "weights.safetensors"
_SEPARATOR = "|"


def write_native(folder: Path, weights: Weights, dtype: torch.dtype) -> None:
    """Write the one task in `weights` (K = 1)."""
    tensors = {
        f"{group}{_SEPARATOR}{name}": tensor[0].to(dtype).contiguous()
        for group, named in weights.items()
        for name, tensor in named.items()
    }
    save_file(tensors, folder / TENSORS, metadata={"format": "hyperscale"})


def read_native(folder: Path, site_map: SiteMap) -> Mapping[str, Mapping[str, Tensor]]:
    """Read back weights [1, S, …] of every group."""
    weights: dict[str, dict[str, Tensor]] = {group: {} for group in site_map.groups}
    for key, tensor in load_file(folder / TENSORS).items():
        group, _, name = key.partition(_SEPARATOR)
        weights[group][name] = tensor.unsqueeze(0)
    return weights
