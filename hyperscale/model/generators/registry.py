"""Generators by the name their settings carry."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hyperscale.config.adaptation import AdaptationSettings
from hyperscale.model.adapters.kinds import AdapterKind
from hyperscale.model.generators.generator import GroupSpecs, group_specs
from hyperscale.model.generators.hypernetwork import Hypernetwork
from hyperscale.model.generators.independent import Independent, Shared
from hyperscale.model.sites import SiteMap
from hyperscale.model.task_encoders.table import TaskTable


def _hypernetwork(settings: AdaptationSettings, site_map: SiteMap, specs: GroupSpecs, num_tasks: int) -> nn.Module:
    generator: Any = settings.generator
    return Hypernetwork(generator, TaskTable(settings.task_encoder, num_tasks), site_map, specs)


def _independent(_settings: AdaptationSettings, site_map: SiteMap, specs: GroupSpecs, num_tasks: int) -> nn.Module:
    return Independent(site_map, specs, num_tasks)


def _shared(_settings: AdaptationSettings, site_map: SiteMap, specs: GroupSpecs, _num_tasks: int) -> nn.Module:
    return Shared(site_map, specs)


GENERATORS: Mapping[str, Callable[[AdaptationSettings, SiteMap, GroupSpecs, int], nn.Module]] = {
    "hypernetwork": _hypernetwork,
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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GENERATORS[settings.generator.kind](settings, site_map, group_specs(site_map, kinds), num_tasks)
