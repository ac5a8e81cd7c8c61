"""Output layers of a hypernetwork: from a site's code to its adapter tensors."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hyperscale.model.adapters.kinds import TensorSpec
from hyperscale.model.generators.generator import GroupSpecs

WEIGHT_STD = 0.01
"""Standard deviation of a head's weights at the start (HyperFormer's released value)."""


class Head(nn.Module):
    """One linear layer, code [.., E] -> tensor [.., *shape].

    A `normal` tensor starts near N(0, 1 / fan_in), carried by the bias, so that tasks start alike and rank-wide;
    a `zero` tensor starts at exactly 0 for every code, and its weights get a gradient from the first step on.
    """

    def __init__(self, code_dim: int, spec: TensorSpec) -> None:
        super().__init__()
        self._spec = spec
        self.linear = nn.Linear(code_dim, spec.numel)
        if spec.start == "zero":
            nn.init.zeros_(self.linear.weight)
            nn.init.zeros_(self.linear.bias)
        else:
            nn.init.normal_(self.linear.weight, std=WEIGHT_STD)
            nn.init.normal_(self.linear.bias, std=spec.std)

    def forward(self, codes: Tensor) -> Tensor:
        """Return tensors [.., *shape] of codes [.., E]."""
        flat: Tensor = self.linear(codes) * self._spec.scale
        tensors: Tensor = flat.unflatten(-1, self._spec.shape)
        return tensors


class Heads(nn.Module):
    """The heads of one stack; tensors of one kind, name and shape share one (HyperLoader, arXiv 2407.01411)."""

    def __init__(self, code_dim: int, specs: GroupSpecs) -> None:
        super().__init__()
        self._keys: dict[tuple[str, str], str] = {}
        self.heads = nn.ModuleDict()
        for group, tensors in specs.items():
            kind = group.split("/")[1]
            for name, spec in tensors.items():
                key = f"{kind}_{name}_{'x'.join(map(str, spec.shape))}"
                self._keys[group, name] = key
                if key not in self.heads:
                    self.heads[key] = Head(code_dim, spec)

    def forward(self, group: str, codes: Tensor) -> Mapping[str, Tensor]:
        """Return the tensors [K, S, …] of one group from its sites' codes [K, S, E]."""
        return {name: self.heads[key](codes) for (owner, name), key in self._keys.items() if owner == group}


def site_rows(indices: list[int]) -> Tensor:
    """Return site indices as an int64 tensor to be kept as a buffer."""
    return torch.tensor(indices, dtype=torch.int64)
