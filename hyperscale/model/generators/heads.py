"""Output layers of a hypernetwork: from a site's code to its adapter tensors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from hyperscale.model.adapters.kinds import TensorSpec
from hyperscale.model.generators.generator import GroupSpecs, parameter_name
from hyperscale.model.generators.starts import head_has_bias, start_bias, start_head
from hyperscale.model.sites import Site, SiteMap


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

    Tensors of one kind, name and shape share a head (HyperLoader, arXiv 2407.01411), or share it only within a
    position. A bias belongs to a head or to a site. A site's bias is an adapter that all tasks share; the heads then
    generate what each task adds to it.
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
        self._has_biases = biases == "head"
        self.heads = nn.ModuleDict()
        self.site_biases = nn.ParameterDict()
        self._parts: dict[str, list[_Part]] = {}
        self._numbers = {group: number for number, group in enumerate(site_map.groups)}
        for group, sites in site_map.groups.items():
            self._parts[group] = [
                _Part(rows, self._add_heads(code_dim, sites[0].kind, position, specs[group]))
                for position, rows in _by_position(sites, by).items()
            ]
            if biases == "site":
                self._add_site_biases(group, len(sites), specs[group])
            self._add_order(group)
        self._keys = {
            (group, row): part.keys for group, parts in self._parts.items() for part in parts for row in part.rows
        }

    def _add_heads(self, code_dim: int, kind: str, position: str, specs: Mapping[str, TensorSpec]) -> dict[str, str]:
        """Create the heads that do not exist yet, and return the key of each tensor's head."""
        keys = {}
        for name, spec in specs.items():
            shape = "x".join(map(str, spec.shape))
            key = "_".join(part for part in (kind, position, name, shape) if part)
            if key not in self.heads:
                self.heads[key] = Head(code_dim, spec, self._has_biases and head_has_bias(spec))
            keys[name] = key
        return keys

    def _add_site_biases(self, group: str, num_sites: int, specs: Mapping[str, TensorSpec]) -> None:
        for name, spec in specs.items():
            bias = nn.Parameter(torch.empty(num_sites, *spec.shape))
            start_bias(bias, spec)
            self.site_biases[parameter_name(group, name)] = bias

    def _add_order(self, group: str) -> None:
        """Store the permutation from map order to the order of the parts, and its inverse."""
        order = site_rows([row for part in self._parts[group] for row in part.rows])
        number = self._numbers[group]
        self.register_buffer(f"_order_{number}", order, persistent=False)
        self.register_buffer(f"_back_{number}", order.argsort(), persistent=False)

    def forward(self, group: str, codes: Tensor) -> Mapping[str, Tensor]:
        """Return the tensors [K, S, …] of one group from its sites' codes [K, S, E]."""
        return self._with_biases(group, slice(None), self._products(group, codes))

    def _products(self, group: str, codes: Tensor) -> Mapping[str, Tensor]:
        parts, number = self._parts[group], self._numbers[group]
        if len(parts) == 1:
            return {name: self.heads[key](codes) for name, key in parts[0].keys.items()}
        ordered = codes.index_select(1, self.get_buffer(f"_order_{number}"))
        codes_of = ordered.split([len(part.rows) for part in parts], dim=1)
        products = {
            name: torch.cat(
                [self.heads[part.keys[name]](of_part) for part, of_part in zip(parts, codes_of, strict=True)], dim=1
            )
            for name in parts[0].keys
        }
        return {name: tensor.index_select(1, self.get_buffer(f"_back_{number}")) for name, tensor in products.items()}

    def site(self, group: str, index: int, codes: Tensor) -> Mapping[str, Tensor]:
        """Return the tensors [K, …] of one site from its codes [K, E]."""
        products = {name: self.heads[key](codes) for name, key in self._keys[group, index].items()}
        return self._with_biases(group, index, products)

    def _with_biases(self, group: str, sites: int | slice, products: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        if not self.site_biases:
            return products
        return {
            name: tensor + self._specs[group][name].scaled(self.site_biases[parameter_name(group, name)][sites])
            for name, tensor in products.items()
        }


@dataclass(frozen=True)
class _Part:
    """Sites of a group that share heads."""

    rows: list[int]
    """Their indices in the group."""
    keys: Mapping[str, str]
    """Tensor name -> the key of its head."""


def _by_position(sites: Sequence[Site], by: Literal["shape", "position"]) -> dict[str, list[int]]:
    """Return the sites' indices by position, or all of them under an empty name."""
    rows: dict[str, list[int]] = {}
    for row, site in enumerate(sites):
        rows.setdefault(site.position if by == "position" else "", []).append(row)
    return rows


def site_rows(indices: list[int]) -> Tensor:
    """Return site indices as an int64 tensor for a buffer."""
    return torch.tensor(indices, dtype=torch.int64)
