"""The interface of a generator: it takes task ids and returns the weights of every site."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from hyperscale.model.adapters.kinds import AdapterKind, TensorSpec
from hyperscale.model.generation import Generation
from hyperscale.model.sites import SiteMap
from hyperscale.model.weights import Weights

GroupSpecs = Mapping[str, Mapping[str, TensorSpec]]
"""Group of a site map -> name -> spec of the tensor that each of the group's sites has."""


class Generator(Protocol):
    """The only part that trains: an `nn.Module` in fp32, replicated on every rank."""

    def __call__(self, task_index: Tensor) -> Weights:
        """Return fp32 weights of all sites for K task ids, int64 [K], in one batched call.

        A group whose weights all tasks share may have 1 in place of K.
        """
        ...

    def site_by_site(self, task_index: Tensor) -> Generation:
        """Return the same weights for a step that cannot hold all of them at once.

        A generator whose parameters are larger than the weights it generates saves nothing, and generates all at once.
        """
        ...

    def task_parameters(self) -> tuple[str, ...]:
        """Return the names of the tensors, trained or not, that consist of one row for each task."""
        ...


def group_specs(site_map: SiteMap, kinds: Sequence[AdapterKind], init: Literal["zero", "paper"] = "zero") -> GroupSpecs:
    """List the tensors that a generator returns, each with the start that `init` selects."""
    by_name = {kind.name: kind for kind in kinds}
    return {
        group: {
            name: replace(spec, start=spec.published or spec.start) if init == "paper" else spec
            for name, spec in by_name[sites[0].kind].tensors(sites[0].in_features, sites[0].out_features).items()
        }
        for group, sites in site_map.groups.items()
    }


def parameter_name(group: str, name: str) -> str:
    """Return the name of the parameter that holds tensor `name` of all sites of a group."""
    return f"{group}/{name}".replace("/", "__")


def keep_known_tasks(generator: nn.Module, num_known: int) -> Mapping[str, int]:
    """Train only the parameters of the tasks from `num_known` on.

    Returns:
        Parameter name -> how many of its first rows must not change.
    """
    per_task = _task_parameters(generator)
    for name, parameter in generator.named_parameters():
        parameter.requires_grad_(name in per_task)
    return {name: num_known for name, parameter in generator.named_parameters() if parameter.requires_grad}


def with_new_tasks(generator: nn.Module, known: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state of a generator with more tasks: the tensors of `known`, and the generator's own new rows.

    Args:
        generator: newly built for all tasks; those of `known` come first.
        known: state of a generator that differs only in the number of tasks.
    """
    state: dict[str, Tensor] = dict(generator.state_dict())
    per_task = _task_parameters(generator)
    for name in per_task:
        state[name] = torch.cat([known[name], state[name][len(known[name]) :].cpu()])
    return {name: state[name] if name in per_task else known[name] for name in state}


def _task_parameters(generator: nn.Module) -> tuple[str, ...]:
    typed: Generator = generator  # type: ignore[assignment]  # no type says both a module and a Generator
    return typed.task_parameters()


def num_parameters(module: nn.Module) -> int:
    """Count a module's parameters."""
    return sum(parameter.numel() for parameter in module.parameters())
