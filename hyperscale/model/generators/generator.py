"""What a generator is: task ids in, the weights of every site out."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor, nn

from hyperscale.model.adapters.kinds import AdapterKind, TensorSpec
from hyperscale.model.sites import SiteMap
from hyperscale.model.weights import Weights

GroupSpecs = Mapping[str, Mapping[str, TensorSpec]]
"""For every group of a site map, the tensors of each of its sites."""


class Generator(Protocol):
    """The only thing that trains. An `nn.Module`, whole on every rank, in fp32."""

    def __call__(self, task_index: Tensor) -> Weights:
        """Return fp32 weights of all sites for K task ids, int64 [K], in one batched call."""
        ...


def group_specs(site_map: SiteMap, kinds: Sequence[AdapterKind]) -> GroupSpecs:
    """List the tensors that a generator has to make."""
    by_name = {kind.name: kind for kind in kinds}
    return {
        group: by_name[sites[0].kind].tensors(sites[0].in_features, sites[0].out_features)
        for group, sites in site_map.groups.items()
    }


def num_parameters(module: nn.Module) -> int:
    """Count a module's parameters."""
    return sum(parameter.numel() for parameter in module.parameters())
