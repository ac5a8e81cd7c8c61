"""Generators by the `kind` of their settings."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hyperscale.config.adaptation import AdaptationSettings, NormDeltaSettings
from hyperscale.config.extensions import generator_implementation
from hyperscale.model.adapters.kinds import AdapterKind
from hyperscale.model.generators.generator import GroupSpecs, group_specs
from hyperscale.model.generators.hypernetwork import Hypernetwork
from hyperscale.model.generators.independent import Independent, Shared, WithStoredWeights
from hyperscale.model.generators.per_layer import PerLayer
from hyperscale.model.sites import SiteMap
from hyperscale.model.task_encoders.registry import TaskEncoder, build_task_encoder


@dataclass(frozen=True)
class GeneratorSpec:
    """What a generator is built from."""

    settings: AdaptationSettings
    site_map: SiteMap
    specs: GroupSpecs
    num_tasks: int
    task_features: Tensor | None

    def task_encoder(self) -> TaskEncoder:
        return build_task_encoder(self.settings.task_encoder, self.num_tasks, self.task_features)


def _hypernetwork(spec: GeneratorSpec) -> nn.Module:
    settings: Any = spec.settings.generator
    return Hypernetwork(settings, spec.task_encoder(), spec.site_map, spec.specs, spec.settings.init)


def _per_layer(spec: GeneratorSpec) -> nn.Module:
    settings: Any = spec.settings.generator
    return PerLayer(settings, spec.task_encoder(), spec.site_map, spec.specs, spec.settings.init)


def _independent(spec: GeneratorSpec) -> nn.Module:
    return Independent(spec.site_map, spec.specs, spec.num_tasks)


def _shared(spec: GeneratorSpec) -> nn.Module:
    return Shared(spec.site_map, spec.specs)


GENERATORS: Mapping[str, Callable[[GeneratorSpec], nn.Module]] = {
    "hypernetwork": _hypernetwork,
    "per_layer": _per_layer,
    "independent": _independent,
    "shared": _shared,
}


def build_generator(
    settings: AdaptationSettings,
    site_map: SiteMap,
    kinds: Sequence[AdapterKind],
    num_tasks: int,
    seed: int,
    task_features: Tensor | None = None,
) -> nn.Module:
    """Build the generator of a recipe. The same seed gives the same parameters on every rank and machine.

    Args:
        task_features: for `task_encoder.kind: text` only, see `build_task_encoder`. `stored_features` reads those of
            a checkpoint.

    Returns:
        An fp32 module on the CPU that fulfils `Generator`.
    """
    specs = group_specs(site_map, kinds, settings.init)
    generated_kinds = {kind.name for kind in kinds if kind.is_generated}
    generated_sites = site_map.where(lambda site: site.kind in generated_kinds)
    stored_sites = site_map.where(lambda site: site.kind not in generated_kinds)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        spec = GeneratorSpec(settings, generated_sites, specs, num_tasks, task_features)
        kind = settings.generator.kind
        build = GENERATORS[kind] if kind in GENERATORS else generator_implementation(kind)
        generator = build(spec) if generated_sites.sites else None
        if generator is not None and not stored_sites.sites:
            return generator
        per_task = _norms_per_task(settings)
        stored = Independent(stored_sites, specs, num_tasks) if per_task else Shared(stored_sites, specs)
        return WithStoredWeights(generator, stored)


def stored_features(tensors: Mapping[str, Tensor]) -> Tensor | None:
    """Return the task features in a generator's state, or None if its tasks are known by number."""
    return next((tensor for name, tensor in tensors.items() if name.endswith("task_encoder.features")), None)


def num_sets(settings: AdaptationSettings, kind: AdapterKind, num_tasks: int) -> int:
    """Return how many sets of a kind's weights serve `num_tasks` tasks: 1 if all tasks share them."""
    is_shared = settings.generator.kind == "shared" if kind.is_generated else not _norms_per_task(settings)
    return 1 if is_shared else num_tasks


def _norms_per_task(settings: AdaptationSettings) -> bool:
    """Return whether every task has its own layer norms."""
    per_task = next((one.per_task for one in settings.adapters if isinstance(one, NormDeltaSettings)), None)
    return not settings.generator.shares_parameters if per_task is None else per_task
