"""Adapters act through forward hooks on the sites' linear layers; the backbone itself is never changed."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hyperscale.model.adapters.kinds import AdapterKind
from hyperscale.model.sites import SiteMap
from hyperscale.model.weights import Weights

SiteWeights = Mapping[str, Mapping[str, Sequence[Tensor]]]
"""For every group its named tensors, one [K, …] a site."""


@dataclass(frozen=True)
class _Active:
    weights: SiteWeights
    slots: Tensor | None
    """[B] index into the weights' task dimension, or None where all samples are of the one task in it."""


@dataclass(frozen=True)
class _Place:
    kind: AdapterKind
    group: str
    index: int


class Injection:
    """The hooks of one backbone. Without active weights they return at once and the backbone is untouched."""

    def __init__(self, backbone: nn.Module, site_map: SiteMap, kinds: Sequence[AdapterKind]) -> None:
        self._active: _Active | None = None
        by_name = {kind.name: kind for kind in kinds}
        order = {kind.name: rank for rank, kind in enumerate(kinds)}
        places: dict[str, list[_Place]] = {}
        for group, sites in site_map.groups.items():
            for index, site in enumerate(sites):
                places.setdefault(site.name, []).append(_Place(by_name[site.kind], group, index))
        self._handles = []
        for name, here in places.items():
            here.sort(key=lambda place: order[place.kind.name])
            hook = self._hook(tuple(here))
            self._handles.append(backbone.get_submodule(name).register_forward_hook(hook))

    @contextmanager
    def active(self, weights: Weights, slots: Tensor) -> Iterator[None]:
        """Adapt forwards inside the `with`, and backwards too, since activation checkpointing runs blocks again there.

        Args:
            weights: in the backbone's dtype, K tasks.
            slots: [B] int64, which of the K tasks each sample is of.
        """
        num_tasks = next(iter(next(iter(weights.values())).values())).shape[0]
        before = self._active
        self._active = _Active(_by_site(weights), None if num_tasks == 1 else slots)
        try:
            yield
        finally:
            self._active = before

    def remove(self) -> None:
        """Take the hooks off the backbone."""
        for handle in self._handles:
            handle.remove()

    def _hook(self, places: tuple[_Place, ...]) -> Any:
        def adapt(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            active = self._active
            if active is None:
                return None
            for place in places:
                output = place.kind.apply(args[0], output, _select(active, place))
            return output

        return adapt


def _by_site(weights: Weights) -> SiteWeights:
    """Cut the tensors into their sites', all at once.

    The backward pass then puts the sites' gradients together in one copy. Were each site to take its slice by itself,
    each would add a gradient of the size of all of them: a quarter of the step at 60 sites.
    """
    return {key: {name: tensor.unbind(1) for name, tensor in group.items()} for key, group in weights.items()}


def _select(active: _Active, place: _Place) -> Mapping[str, Tensor]:
    """Return the site's weights: the one task's, or each sample's own [B, …].

    These copies are what `bmm` keeps for the backward pass, at most B tasks' weights. Measured against them on CPUs:
    one product over all K tasks with the others masked is slower in fp32, one product a task slower in both dtypes.
    """
    group = {name: tensors[place.index] for name, tensors in active.weights[place.group].items()}
    if active.slots is None:
        return {name: tensor[0] for name, tensor in group.items()}
    return {name: tensor.index_select(0, active.slots) for name, tensor in group.items()}
