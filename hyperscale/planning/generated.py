"""Whether a step generates all weights at once or site by site; the plan and the workers decide it in the same way."""

from collections.abc import Sequence

from hyperscale.config.adaptation import AdaptationSettings
from hyperscale.config.data import DataSettings
from hyperscale.config.engine import EngineSettings
from hyperscale.config.sizes import parse_size
from hyperscale.model.adapters.kinds import AdapterKind
from hyperscale.model.build import Blueprint
from hyperscale.model.generators.generator import group_specs
from hyperscale.model.generators.registry import num_sets
from hyperscale.model.sites import SiteMap

_FP32 = 4


def generates_site_by_site(
    engine: EngineSettings, adaptation: AdaptationSettings, blueprint: Blueprint, num_tasks: int, itemsize: int
) -> bool:
    """Return whether the weights of a step exceed `engine.generated_budget` and the blocks run again anyway.

    Without activation checkpointing every site keeps its weights for the backward pass in either case.

    Args:
        num_tasks: tasks of a step, see `tasks_of_a_step`.
        itemsize: bytes of an element in the backbone's dtype.
    """
    if not engine.activation_checkpointing:
        return False
    num_bytes = generated_bytes(adaptation, blueprint.site_map, blueprint.kinds, num_tasks, itemsize)
    return num_bytes > parse_size(engine.generated_budget)


def generated_bytes(
    settings: AdaptationSettings, site_map: SiteMap, kinds: Sequence[AdapterKind], num_tasks: int, itemsize: int
) -> int:
    """Return the bytes of all sites' weights for `num_tasks` tasks: fp32 weights, fp32 gradients, and a copy.

    The copy has `itemsize` bytes per element. Weights that all tasks share count once.
    """
    specs = group_specs(site_map, kinds)
    sets = {kind.name: num_sets(settings, kind, num_tasks) for kind in kinds}
    numel = sum(
        sets[sites[0].kind] * len(sites) * spec.numel
        for group, sites in site_map.groups.items()
        for spec in specs[group].values()
    )
    return numel * (2 * _FP32 + itemsize)


def tasks_of_a_step(data: DataSettings, batch_size: int, workers: int) -> int:
    """Return the largest number of tasks in one rank's share of a step of `batch_size` rows."""
    return min(len(data.tasks), batch_size // workers) if data.mixed_tasks else 1
