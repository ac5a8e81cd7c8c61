"""Hooks on the sites' layers apply the adapters. The backbone itself never changes."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hyperscale.model import hooks
from hyperscale.model.adapters.kinds import AdapterKind, Place, SharesConstants
from hyperscale.model.adapters.prefix import Prefix
from hyperscale.model.architectures import Architecture, architecture_of
from hyperscale.model.generation import Source, split_by_site
from hyperscale.model.sites import SiteMap
from hyperscale.model.weights import cast


@dataclass(frozen=True)
class _Active:
    source: Source
    slots: Tensor | None
    """[B] index into the weights' task dimension, or None if all samples have the same task."""


@dataclass(frozen=True)
class _Place:
    place: Place
    kind: AdapterKind
    group: str
    index: int


class _Constants:
    """Frozen tensors that the sites of a kind share, kept in the dtype and on the device of their last use."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = self._cast = tensors

    def like(self, tensor: Tensor) -> Mapping[str, Tensor]:
        first = next(iter(self._cast.values()))
        if (first.dtype, first.device) != (tensor.dtype, tensor.device):
            self._cast = {name: one.to(tensor.device, tensor.dtype) for name, one in self._tensors.items()}
        return self._cast


class Injection:
    """The hooks of one backbone. Without active weights they do nothing."""

    def __init__(self, backbone: nn.Module, site_map: SiteMap, kinds: Sequence[AdapterKind]) -> None:
        self._active: _Active | None = None
        self._constants = {
            kind.name: _Constants(kind.constants([site.sizes for site in site_map.sites_of(kind.name)]))
            for kind in kinds
            if isinstance(kind, SharesConstants)
        }
        by_name = {kind.name: kind for kind in kinds}
        order = {kind.name: rank for rank, kind in enumerate(kinds)}
        config: Any = backbone.config
        architecture = architecture_of(config.model_type)
        places: dict[tuple[str, str], list[_Place]] = {}
        for group, sites in site_map.groups.items():
            for index, site in enumerate(sites):
                kind = by_name[site.kind]
                here = _Place(kind.acts_on(site.position), kind, group, index)
                places.setdefault((site.name, _WAYS[here.place]), []).append(here)
        self._handles: list[RemovableHandle] = []
        for (name, way), here_all in places.items():
            here_all.sort(key=lambda place: order[place.kind.name])
            layer, acting = backbone.get_submodule(name), partial(self._acting, tuple(here_all))
            self._handles.extend(_hook(way, layer, acting, architecture))
        lengths = [kind.length for kind in kinds if isinstance(kind, Prefix)]
        if lengths and architecture.rotary:
            rotary = backbone.get_submodule(architecture.rotary)
            self._handles.append(hooks.before_rotary(rotary, lambda: lengths[0] if self._active else 0))

    @contextmanager
    def active(self, source: Source, slots: Tensor | None) -> Iterator[None]:
        """Adapt forwards inside the `with`; backwards too, because activation checkpointing runs blocks again there.

        Args:
            source: the weights of K tasks, by site.
            slots: [B] int64, the index of each sample's task among the K; None if all samples have the same task.
        """
        before = self._active
        self._active = _Active(source, slots)
        try:
            yield
        finally:
            self._active = before

    def keep(self, rows: Tensor) -> None:
        """Continue with only these rows of the batch until the `with` of `active` ends; outside of it, do nothing."""
        if self._active and self._active.slots is not None:
            self._active = replace(self._active, slots=self._active.slots[rows])

    def remove(self) -> None:
        """Remove the hooks from the backbone."""
        for handle in self._handles:
            handle.remove()

    def _acting(self, places: tuple[_Place, ...]) -> Sequence[hooks.Act]:
        active = self._active
        if active is None:
            return ()
        return [hooks.Act(place.place, place.kind, self._weights(active, place)) for place in places]

    def _weights(self, active: _Active, place: _Place) -> Mapping[str, Tensor]:
        weights, constants = _select(active, place), self._constants.get(place.kind.name)
        return {**weights, **constants.like(next(iter(weights.values())))} if constants else weights


def adapting(
    injection: Injection, generator: nn.Module, tasks: Tensor, dtype: torch.dtype, site_by_site: bool = False
) -> AbstractContextManager[None]:
    """Generate the adapters of a batch once, and adapt forwards and their backwards inside the `with`.

    The call itself generates. Gradients reach the generator, unless gradients are off when this is called.

    Args:
        generator: see `generators.generator.Generator`.
        tasks: [B] int64, the task id of each sample; [1] is the task of every sample.
        dtype: the backbone's dtype.
        site_by_site: without gradients, generate each site's weights when it first acts, so that the fp32 weights of
            all sites never exist at once. With gradients every site's weights stay for the backward pass anyway.
    """
    device = next((parameter.device for parameter in generator.parameters()), tasks.device)  # bundles have none
    known, inverse = torch.unique(tasks, return_inverse=True)
    slots = None if len(known) == 1 else inverse.to(device)
    if site_by_site and not torch.is_grad_enabled():
        per_site: Any = generator.site_by_site
        return injection.active(cache(per_site(known.to(device)).source(dtype)), slots)
    return injection.active(split_by_site(cast(generator(known.to(device)), dtype)), slots)


_WAYS: Mapping[Place, str] = {
    "projections": "after",
    "sublayers": "after",
    "inputs": "before",
    "norms": "inside_norm",
    "keys": "inside_attention",
    "values": "inside_attention",
}


def _hook(way: str, layer: nn.Module, acting: hooks.Acting, architecture: Architecture) -> Sequence[RemovableHandle]:
    match way:
        case "after":
            return [hooks.after(layer, acting)]
        case "before":
            return [hooks.before(layer, acting)]
        case "inside_norm":
            return hooks.inside_norm(layer, acting)
        case _:
            return [hooks.inside_attention(layer, acting, architecture.mask_argument)]


def _select(active: _Active, place: _Place) -> Mapping[str, Tensor]:
    """Return the site's weights for each sample [B, …]; a single set is returned without that dimension.

    `bmm` keeps these copies for the backward pass: the weights of at most B tasks. Two alternatives were measured on
    CPUs. One product over all K tasks with masks is slower in fp32; one product per task is slower in both dtypes.
    """
    group = active.source(place.group, place.index)
    slots = active.slots
    return {
        name: tensor[0] if slots is None or len(tensor) == 1 else tensor.index_select(0, slots)
        for name, tensor in group.items()
    }
