"""Adapter weights stored as parameters: one set for each task (Houlsby et al.) or one set for all."""

from typing import Any

import torch
from torch import Tensor, nn

from hyperscale.model.generation import CombinedGeneration, EagerGeneration, Generation
from hyperscale.model.generators.generator import GroupSpecs, parameter_name
from hyperscale.model.generators.starts import start_stored
from hyperscale.model.sites import SiteMap
from hyperscale.model.weights import Weights


class WeightTable(nn.Module):
    """Stored weights of all sites: `num_sets` rows, with the same shapes [num_sets, S, …] as generated weights."""

    def __init__(self, site_map: SiteMap, specs: GroupSpecs, num_sets: int) -> None:
        super().__init__()
        self._specs = {group: specs[group] for group in site_map.groups}
        self._names: dict[tuple[str, str], str] = {}
        for group, sites in site_map.groups.items():
            for name, spec in specs[group].items():
                key = parameter_name(group, name)
                start = torch.empty(num_sets, len(sites), *spec.shape)
                start_stored(start, spec)
                self.register_parameter(key, nn.Parameter(start))
                self._names[group, name] = key

    def rows(self, index: Tensor) -> Weights:
        """Return the weights [K, S, …] of rows [K]."""
        return {
            group: {
                name: spec.scaled(self.get_parameter(self._names[group, name]).index_select(0, index))
                for name, spec in specs.items()
            }
            for group, specs in self._specs.items()
        }


class Independent(nn.Module):
    """Every task has its own adapter weights; no parameter is touched by two tasks."""

    def __init__(self, site_map: SiteMap, specs: GroupSpecs, num_tasks: int) -> None:
        super().__init__()
        self.table = WeightTable(site_map, specs, num_tasks)

    def forward(self, task_index: Tensor) -> Weights:
        """Return the weights of task ids [K]."""
        return self.table.rows(task_index)

    def site_by_site(self, task_index: Tensor) -> Generation:
        """Return all weights at once: copies of rows, no larger than the parameters."""
        return EagerGeneration(self(task_index))

    def task_parameters(self) -> tuple[str, ...]:
        """Return all names: every parameter holds a row for each task."""
        return tuple(name for name, _ in self.named_parameters())


class Shared(nn.Module):
    """All tasks have the same adapter weights; the task ids are ignored."""

    def __init__(self, site_map: SiteMap, specs: GroupSpecs) -> None:
        super().__init__()
        self.table = WeightTable(site_map, specs, 1)

    def forward(self, task_index: Tensor) -> Weights:
        """Return the one set of weights, [1, S, …] for any number of task ids."""
        return self.table.rows(task_index.new_zeros(1))

    def site_by_site(self, task_index: Tensor) -> Generation:
        """Return all weights at once: a copy of the parameters."""
        return EagerGeneration(self(task_index))

    def task_parameters(self) -> tuple[str, ...]:
        """Return no name: no parameter belongs to one task."""
        return ()


class WithStoredWeights(nn.Module):
    """A generator, and stored weights for the adapter kinds that are not generated."""

    def __init__(self, generated: Any, kept: Any) -> None:
        """`generated`: a generator, or None if no site is generated; `kept`: the stored weights of the other sites."""
        super().__init__()
        self.generated = generated
        self.kept = kept

    def forward(self, task_index: Tensor) -> Weights:
        """Return the weights of all sites for task ids [K]."""
        generated: Weights = {} if self.generated is None else self.generated(task_index)
        kept: Weights = self.kept(task_index)
        return {**generated, **kept}

    def site_by_site(self, task_index: Tensor) -> Generation:
        """Return the generated weights site by site, and the stored ones at once."""
        kept: Weights = self.kept(task_index)
        return (
            EagerGeneration(kept)
            if self.generated is None
            else CombinedGeneration(self.generated.site_by_site(task_index), kept)
        )

    @property
    def task_encoder(self) -> nn.Module | None:
        """The generator's task encoder, if it has one."""
        return getattr(self.generated, "task_encoder", None)

    def task_parameters(self) -> tuple[str, ...]:
        """Return the names of both parts."""
        parts = {"generated": self.generated, "kept": self.kept}
        return tuple(
            f"{name}.{parameter}" for name, part in parts.items() if part for parameter in part.task_parameters()
        )
