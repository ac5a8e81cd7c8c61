"""Generators by the name their settings carry."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hyperscale.config.adaptation import AdaptationSettings, NormDeltaSettings
from hyperscale.model.adapters.kinds import AdapterKind
from hyperscale.model.generators.generator import GroupSpecs, group_specs
from hyperscale.model.generators.hypernetwork import Hypernetwork
from hyperscale.model.generators.independent import Independent, Shared, Together
from hyperscale.model.generators.per_layer import PerLayer
from hyperscale.model.sites import SiteMap
from hyperscale.model.task_encoders.table import TaskTable


def _hypernetwork(settings: AdaptationSettings, site_map: SiteMap, specs: GroupSpecs, num_tasks: int) -> nn.Module:
    generator: Any = settings.generator
    return Hypernetwork(generator, TaskTable(settings.task_encoder, num_tasks), site_map, specs, settings.init)


def _per_layer(settings: AdaptationSettings, site_map: SiteMap, specs: GroupSpecs, num_tasks: int) -> nn.Module:
    generator: Any = settings.generator
    return PerLayer(generator, TaskTable(settings.task_encoder, num_tasks), site_map, specs, settings.init)


def _independent(_settings: AdaptationSettings, site_map: SiteMap, specs: GroupSpecs, num_tasks: int) -> nn.Module:
    return Independent(site_map, specs, num_tasks)


def _shared(_settings: AdaptationSettings, site_map: SiteMap, specs: GroupSpecs, _num_tasks: int) -> nn.Module:
    return Shared(site_map, specs)


GENERATORS: Mapping[str, Callable[[AdaptationSettings, SiteMap, GroupSpecs, int], nn.Module]] = {
    "hypernetwork": _hypernetwork,
    "per_layer": _per_layer,
    "independent": _independent,
    "shared": _shared,
}


def build_generator(
    settings: AdaptationSettings, site_map: SiteMap, kinds: Sequence[AdapterKind], num_tasks: int, seed: int
) -> nn.Module:
    """Make the generator of a recipe: the same parameters for the same seed, on every rank and machine.

    Returns:
        An fp32 module on the CPU that fulfils `Generator`.
    """
    specs = group_specs(site_map, kinds, settings.init)
    generated = {kind.name for kind in kinds if kind.is_generated}
    made = site_map.where(lambda site: site.kind in generated)
    kept = site_map.where(lambda site: site.kind not in generated)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generator = GENERATORS[settings.generator.kind](settings, made, specs, num_tasks) if made.sites else None
        if generator is not None and not kept.sites:
            return generator
        beside = Independent(kept, specs, num_tasks) if _norms_per_task(settings) else Shared(kept, specs)
        return Together(generator, beside)


def _norms_per_task(settings: AdaptationSettings) -> bool:
    """Return whether every task has its own layer norms."""
    asked = next((one.per_task for one in settings.adapters if isinstance(one, NormDeltaSettings)), None)
    return settings.generator.kind == "independent" if asked is None else asked
