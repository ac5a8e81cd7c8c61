"""Output layers of a hypernetwork: from a site's code to its adapter tensors."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from hyperscale.model.adapters.kinds import TensorSpec
from hyperscale.model.generators.generator import GroupSpecs, parameter_name
from hyperscale.model.generators.starts import head_has_bias, start_bias, start_head
from hyperscale.model.sites import SiteMap


class Head(nn.Module):
    """One linear layer, code [.., E] -> tensor [.., *shape]."""

    def __init__(self, code_dim: int, spec: TensorSpec, has_bias: bool) -> None:
        super().__init__()
        self._spec = spec
        self.linear = nn.Linear(code_dim, spec.numel, bias=has_bias)
        start_head(self.linear.weight, self.linear.bias, spec)

    def forward(self, codes: Tensor) -> Tensor:
        """Return tensors [.., *shape] of codes [.., E]."""
        flat = self._spec.scaled(self.linear(codes))
        tensors: Tensor = flat.unflatten(-1, self._spec.shape)
        return tensors


class SiteHeads(nn.Module):
    """A head for each of S sites, codes [K, E] -> tensors [K, S, *shape], in one product."""

    def __init__(self, num_sites: int, code_dim: int, spec: TensorSpec) -> None:
        super().__init__()
        self._spec = spec
        self.weight = nn.Parameter(torch.empty(num_sites, spec.numel, code_dim))
        bias = nn.Parameter(torch.empty(num_sites, spec.numel)) if head_has_bias(spec) else None
        self.register_parameter("bias", bias)
        start_head(self.weight, bias, spec)

    def forward(self, codes: Tensor) -> Tensor:
        """Return tensors [K, S, *shape] of codes [K, E]."""
        flat = (codes @ self.weight.flatten(0, 1).T).unflatten(-1, self.weight.shape[:2])
        if self.bias is not None:
            flat = flat + self.bias
        tensors: Tensor = self._spec.scaled(flat).unflatten(-1, self._spec.shape)
        return tensors


class Heads(nn.Module):
    """The heads of one stack.

    Tensors of one kind, name and shape share one (HyperLoader, arXiv 2407.01411), or share it only within a position.
    Biases are the heads' own, or every site's: then heads make what tasks add to an adapter that they all have.
    """

    def __init__(
        self,
        code_dim: int,
        site_map: SiteMap,
        specs: GroupSpecs,
        by: Literal["shape", "position"] = "shape",
        biases: Literal["head", "site"] = "head",
    ) -> None:
        super().__init__()
        self._specs = {group: specs[group] for group in site_map.groups}
        self._parts: dict[str, list[_Part]] = {}
        self._keys: dict[tuple[str, int], Mapping[str, str]] = {}
        self.heads = nn.ModuleDict()
        self.site_biases = nn.ParameterDict()
        for number, (group, sites) in enumerate(site_map.groups.items()):
            positions = [site.position if by == "position" else "" for site in sites]
            self._parts[group] = []
            places: list[int] = []
            for position in dict.fromkeys(positions):
                here = [place for place, other in enumerate(positions) if other == position]
                keys = {}
                for name, spec in specs[group].items():
                    shape = "x".join(map(str, spec.shape))
                    keys[name] = "_".join(part for part in (sites[0].kind, position, name, shape) if part)
                    if keys[name] not in self.heads:
                        self.heads[keys[name]] = Head(code_dim, spec, biases == "head" and head_has_bias(spec))
                self._parts[group].append(_Part(slice(len(places), len(places) + len(here)), keys))
                self._keys |= {(group, place): keys for place in here}
                places += here
            for name, spec in specs[group].items() if biases == "site" else ():
                bias = nn.Parameter(torch.empty(len(sites), *spec.shape))
                start_bias(bias, spec)
                self.site_biases[parameter_name(group, name)] = bias
            # sites come in map order, heads want them by position: there and back
            self.register_buffer(f"_order_{number}", site_rows(places), persistent=False)
            self.register_buffer(f"_back_{number}", site_rows(places).argsort(), persistent=False)
        self._numbers = {group: number for number, group in enumerate(self._parts)}

    def forward(self, group: str, codes: Tensor) -> Mapping[str, Tensor]:
        """Return the tensors [K, S, …] of one group from its sites' codes [K, S, E]."""
        return self._with_biases(group, slice(None), self._products(group, codes))

    def _products(self, group: str, codes: Tensor) -> Mapping[str, Tensor]:
        parts, number = self._parts[group], self._numbers[group]
        if len(parts) == 1:
            return {name: self.heads[key](codes) for name, key in parts[0].keys.items()}
        ordered = codes.index_select(1, self.get_buffer(f"_order_{number}"))
        made = {
            name: torch.cat([self.heads[part.keys[name]](ordered[:, part.rows]) for part in parts], dim=1)
            for name in parts[0].keys
        }
        return {name: tensor.index_select(1, self.get_buffer(f"_back_{number}")) for name, tensor in made.items()}

    def site(self, group: str, index: int, codes: Tensor) -> Mapping[str, Tensor]:
        """Return the tensors [K, …] of one site from its codes [K, E]."""
        made = {name: self.heads[key](codes) for name, key in self._keys[group, index].items()}
        return self._with_biases(group, index, made)

    def _with_biases(self, group: str, sites: int | slice, made: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        if not self.site_biases:
            return made
        return {
            name: tensor + self._specs[group][name].scaled(self.site_biases[parameter_name(group, name)][sites])
            for name, tensor in made.items()
        }


class _Part:
    """Sites of a group that share heads: where they lie once ordered, and the heads' keys by tensor name."""

    def __init__(self, rows: slice, keys: Mapping[str, str]) -> None:
        self.rows = rows
        self.keys = keys


def site_rows(indices: list[int]) -> Tensor:
    """Return site indices as an int64 tensor to be kept as a buffer."""
    return torch.tensor(indices, dtype=torch.int64)
