"""Whether a step generates all weights at once or site by site; the plan and the workers decide it in the same way."""

from collections.abc import Sequence

from hyperscale.config.adaptation import AdaptationSettings
from hyperscale.config.run import Recipe
from hyperscale.config.sizes import parse_size
from hyperscale.model.adapters.kinds import AdapterKind
from hyperscale.model.backbone import DTYPES
from hyperscale.model.generators.generator import group_specs
from hyperscale.model.generators.registry import num_sets
from hyperscale.model.sites import SiteMap

_FP32 = 4


def generates_site_by_site(recipe: Recipe, site_map: SiteMap, kinds: Sequence[AdapterKind]) -> bool:
    """Return whether the weights of a step exceed `engine.generated_budget` and the blocks run again anyway.

    Without activation checkpointing every site keeps its weights for the backward pass in either case.
    """
    if not recipe.engine.activation_checkpointing:
        return False
    itemsize = DTYPES[recipe.backbone.dtype].itemsize
    num_bytes = generated_bytes(recipe.adaptation, site_map, kinds, tasks_of_a_step(recipe), itemsize)
    return num_bytes > parse_size(recipe.engine.generated_budget)


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


def tasks_of_a_step(recipe: Recipe) -> int:
    """Return the largest number of tasks in one rank's share of a step."""
    per_rank = recipe.training.batch_size // recipe.cluster.workers
    return min(len(recipe.data.tasks), per_rank) if recipe.data.mixed_tasks else 1
