"""Whether the weights of a step are made at once, or at every site: decided alike by the plan and by the workers."""

from collections.abc import Sequence

from hyperscale.config.run import Recipe
from hyperscale.config.sizes import parse_size
from hyperscale.model.adapters.kinds import AdapterKind
from hyperscale.model.backbone import DTYPES
from hyperscale.model.generators.generator import group_specs
from hyperscale.model.sites import SiteMap

_FP32 = 4


def generates_site_by_site(recipe: Recipe, site_map: SiteMap, kinds: Sequence[AdapterKind]) -> bool:
    """Return whether the weights of a step exceed `engine.generated_budget` and the blocks run again anyway.

    Without activation checkpointing every site keeps its weights for the backward pass, whoever makes them.
    """
    if not recipe.engine.activation_checkpointing:
        return False
    itemsize = DTYPES[recipe.backbone.dtype].itemsize
    return generated_bytes(site_map, kinds, tasks_of_a_step(recipe), itemsize) > parse_size(
        recipe.engine.generated_budget
    )


def generated_bytes(site_map: SiteMap, kinds: Sequence[AdapterKind], num_tasks: int, itemsize: int) -> int:
    """Return the bytes of all sites' weights for so many tasks: fp32, fp32 gradients, and the copy that acts."""
    specs = group_specs(site_map, kinds)
    numel = sum(len(sites) * spec.numel for group, sites in site_map.groups.items() for spec in specs[group].values())
    return num_tasks * numel * (2 * _FP32 + itemsize)


def tasks_of_a_step(recipe: Recipe) -> int:
    """Return how many tasks can meet in one rank's share of a step."""
    per_rank = recipe.training.batch_size // recipe.cluster.workers
    return min(len(recipe.data.tasks), per_rank) if recipe.data.mixed_tasks else 1
