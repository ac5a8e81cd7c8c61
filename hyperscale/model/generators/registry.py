"""Generators by the name their settings carry."""

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
    """What a generator is made for."""

    settings: AdaptationSettings
    site_map: SiteMap
    specs: GroupSpecs
    num_tasks: int
    task_features: Tensor | None

    def task_encoder(self) -> TaskEncoder:
        return build_task_encoder(self.settings.task_encoder, self.num_tasks, self.task_features)


def _hypernetwork(ask: GeneratorSpec) -> nn.Module:
    settings: Any = ask.settings.generator
    return Hypernetwork(settings, ask.task_encoder(), ask.site_map, ask.specs, ask.settings.init)


def _per_layer(ask: GeneratorSpec) -> nn.Module:
    settings: Any = ask.settings.generator
    return PerLayer(settings, ask.task_encoder(), ask.site_map, ask.specs, ask.settings.init)


def _independent(ask: GeneratorSpec) -> nn.Module:
    return Independent(ask.site_map, ask.specs, ask.num_tasks)


def _shared(ask: GeneratorSpec) -> nn.Module:
    return Shared(ask.site_map, ask.specs)


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
    """Make the generator of a recipe: the same parameters for the same seed, on every rank and machine.

    Args:
        task_features: for `task_encoder.kind: text` only, see `build_task_encoder`; `stored_features` finds those of a
            checkpoint.

    Returns:
        An fp32 module on the CPU that fulfils `Generator`.
    """
    specs = group_specs(site_map, kinds, settings.init)
    generated = {kind.name for kind in kinds if kind.is_generated}
    made = site_map.where(lambda site: site.kind in generated)
    kept = site_map.where(lambda site: site.kind not in generated)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        ask = GeneratorSpec(settings, made, specs, num_tasks, task_features)
        kind = settings.generator.kind
        build = GENERATORS[kind] if kind in GENERATORS else generator_implementation(kind)
        generator = build(ask) if made.sites else None
        if generator is not None and not kept.sites:
            return generator
        beside = Independent(kept, specs, num_tasks) if _norms_per_task(settings) else Shared(kept, specs)
        return WithStoredWeights(generator, beside)


def stored_features(tensors: Mapping[str, Tensor]) -> Tensor | None:
    """Return the task features in a generator's state, or None if its tasks are known by number."""
    return next((tensor for name, tensor in tensors.items() if name.endswith("task_encoder.features")), None)


def _norms_per_task(settings: AdaptationSettings) -> bool:
    """Return whether every task has its own layer norms."""
    asked = next((one.per_task for one in settings.adapters if isinstance(one, NormDeltaSettings)), None)
    return not settings.generator.shares_parameters if asked is None else asked
