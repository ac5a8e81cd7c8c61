"""A hypernetwork for every layer and position, shared by the tasks (HyperFormer, arXiv 2106.04489, section 2.3)."""

from typing import Literal

from torch import Tensor, nn

from hyperscale.config.adaptation import PerLayerSettings
from hyperscale.model.generation import EagerGeneration, Generation
from hyperscale.model.generators.generator import GroupSpecs, parameter_name
from hyperscale.model.generators.heads import SiteHeads
from hyperscale.model.generators.starts import start_trunk
from hyperscale.model.sites import SiteMap
from hyperscale.model.task_encoders.registry import TaskEncoder
from hyperscale.model.weights import Weights


class PerLayer(nn.Module):
    """task code -> Linear -> ReLU -> Linear: one code per task for all sites; every site has its own heads."""

    def __init__(
        self,
        settings: PerLayerSettings,
        task_encoder: TaskEncoder,
        site_map: SiteMap,
        specs: GroupSpecs,
        init: Literal["zero", "paper"] = "zero",
    ) -> None:
        super().__init__()
        self.task_encoder = task_encoder
        self.project = nn.Sequential(
            nn.Linear(task_encoder.dim, settings.hidden_dim),
            nn.ReLU(),
            nn.Linear(settings.hidden_dim, settings.code_dim),
        )
        if init == "paper":
            start_trunk(self.project)
        self._keys = {group: {name: parameter_name(group, name) for name in specs[group]} for group in site_map.groups}
        self.heads = nn.ModuleDict(
            {
                self._keys[group][name]: SiteHeads(len(sites), settings.code_dim, spec)
                for group, sites in site_map.groups.items()
                for name, spec in specs[group].items()
            }
        )

    def forward(self, task_index: Tensor) -> Weights:
        """Return the weights of all sites for task ids [K]."""
        codes = self.project(self.task_encoder(task_index))
        return {
            group: {name: self.heads[key](codes) for name, key in named.items()} for group, named in self._keys.items()
        }

    def site_by_site(self, task_index: Tensor) -> Generation:
        """Return all weights at once: for up to `code_dim` tasks, a site's heads are larger than its weights."""
        return EagerGeneration(self(task_index))

    def task_parameters(self) -> tuple[str, ...]:
        """Return the name of the task encoder's tensor with a row for each task."""
        return (f"task_encoder.{self.task_encoder.rows}",)
