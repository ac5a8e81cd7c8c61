"""One network generates all weights from task, layer and position embeddings.

HyperFormer++ (arXiv 2106.04489) for bottlenecks; HyperLoader (arXiv 2407.01411) for LoRA.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hyperscale.config.adaptation import HypernetworkSettings
from hyperscale.model.generation import Generation, PerSiteGeneration
from hyperscale.model.generators.generator import GroupSpecs
from hyperscale.model.generators.heads import Heads, site_rows
from hyperscale.model.generators.starts import start_trunk
from hyperscale.model.sites import SiteMap
from hyperscale.model.task_encoders.registry import TaskEncoder
from hyperscale.model.weights import Weights


class Trunk(nn.Module):
    """concat[task | layer | position] -> Linear -> ReLU -> Linear -> LayerNorm: one code for every task and site."""

    def __init__(
        self, settings: HypernetworkSettings, task_dim: int, layers: list[int], positions: list[int], num_positions: int
    ) -> None:
        super().__init__()
        self.layer_embedding = nn.Embedding(1 + max(layers), settings.layer_dim)
        self.position_embedding = nn.Embedding(num_positions, settings.position_dim)
        nn.init.normal_(self.layer_embedding.weight)
        nn.init.normal_(self.position_embedding.weight)
        self.project = nn.Sequential(
            nn.Linear(task_dim + settings.layer_dim + settings.position_dim, settings.hidden_dim),
            nn.ReLU(),
            nn.Linear(settings.hidden_dim, settings.code_dim),
            nn.LayerNorm(settings.code_dim, eps=1e-6),
        )
        self.register_buffer("_layers", site_rows(layers), persistent=False)
        self.register_buffer("_positions", site_rows(positions), persistent=False)

    def forward(self, task_codes: Tensor) -> Tensor:
        """Return codes [K, S, E'] of task codes [K, E] at all S sites."""
        layers = self.layer_embedding(self.get_buffer("_layers"))
        positions = self.position_embedding(self.get_buffer("_positions"))
        sites = torch.cat([layers, positions], dim=-1)
        num_tasks, num_sites = task_codes.shape[0], sites.shape[0]
        pairs = torch.cat(
            [task_codes.unsqueeze(1).expand(-1, num_sites, -1), sites.unsqueeze(0).expand(num_tasks, -1, -1)], dim=-1
        )
        codes: Tensor = self.project(pairs)
        return codes


class StackGenerator(nn.Module):
    """Trunk and heads for the sites of one stack, or of all stacks together.

    A position has the same number in every stack, as in HyperLoader. So the encoder's table also has rows for the
    decoder's cross-attention, which it never uses.
    """

    def __init__(
        self,
        settings: HypernetworkSettings,
        task_dim: int,
        site_map: SiteMap,
        specs: GroupSpecs,
        positions: tuple[str, ...],
    ) -> None:
        super().__init__()
        ids = {name: number for number, name in enumerate(positions)}
        blocks = {
            block: number
            for number, block in enumerate(dict.fromkeys((site.stack, site.layer) for site in site_map.sites))
        }
        layers = [blocks[site.stack, site.layer] for site in site_map.sites]
        numbers = [ids[f"{site.kind}:{site.position}"] for site in site_map.sites]
        self.trunk = Trunk(settings, task_dim, layers, numbers, len(ids))
        self.heads = Heads(settings.code_dim, site_map, specs, settings.heads, settings.biases)
        rows = {site: row for row, site in enumerate(site_map.sites)}
        self._rows_of = {group: [rows[site] for site in sites] for group, sites in site_map.groups.items()}
        self._buffers_of: dict[str, str] = {}
        for number, (group, of_group) in enumerate(self._rows_of.items()):
            self._buffers_of[group] = f"_rows_{number}"
            self.register_buffer(f"_rows_{number}", site_rows(of_group), persistent=False)

    def forward(self, task_codes: Tensor) -> Weights:
        """Return the weights of this generator's groups for task codes [K, E]."""
        codes = self.trunk(task_codes)
        return {
            group: self.heads(group, codes.index_select(1, self.get_buffer(buffer)))
            for group, buffer in self._buffers_of.items()
        }

    def site(self, group: str, index: int, codes: Tensor) -> Mapping[str, Tensor]:
        """Return the tensors [K, …] of one site from the codes [K, S, E'] of all."""
        return self.heads.site(group, index, codes[:, self._rows_of[group][index]])


class Hypernetwork(nn.Module):
    """Task encoder and one `StackGenerator` per stack (or one for all)."""

    def __init__(
        self,
        settings: HypernetworkSettings,
        task_encoder: TaskEncoder,
        site_map: SiteMap,
        specs: GroupSpecs,
        init: Literal["zero", "paper"] = "zero",
    ) -> None:
        super().__init__()
        self.task_encoder = task_encoder
        parts = {"joint": site_map} if settings.stacks == "joint" else _by_stack(site_map)
        self.stacks = nn.ModuleDict(
            {
                name: StackGenerator(settings, task_encoder.dim, part, specs, site_map.positions)
                for name, part in parts.items()
            }
        )
        self._stack_of = {group: name for name, part in parts.items() for group in part.groups}
        if init == "paper":
            for stack in self.stacks.values():
                start_trunk(stack.get_submodule("trunk"))

    def forward(self, task_index: Tensor) -> Weights:
        """Return the weights of all sites for task ids [K]."""
        task_codes = self.task_encoder(task_index)
        weights: dict[str, dict[str, Tensor]] = {}
        for generator in self.stacks.values():
            weights.update(generator(task_codes))
        return weights

    def site_by_site(self, task_index: Tensor) -> Generation:
        """Return a generation that runs the trunks once and the heads at every site."""
        task_codes = self.task_encoder(task_index)
        codes = {name: stack.get_submodule("trunk")(task_codes) for name, stack in self.stacks.items()}
        return PerSiteGeneration(codes, self._site)

    def _site(self, group: str, index: int, codes: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        name = self._stack_of[group]
        stack: Any = self.stacks[name]
        tensors: Mapping[str, Tensor] = stack.site(group, index, codes[name])
        return tensors

    def task_parameters(self) -> tuple[str, ...]:
        """Return the name of the task encoder's tensor with a row for each task."""
        return (f"task_encoder.{self.task_encoder.rows}",)


def _by_stack(site_map: SiteMap) -> dict[str, SiteMap]:
    return {stack: SiteMap(tuple(site for site in site_map.sites if site.stack == stack)) for stack in site_map.stacks}
