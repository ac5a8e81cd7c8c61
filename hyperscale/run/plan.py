"""`hyperscale plan`: what a recipe needs on a given machine. Neither the machine nor the weights are used."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from hyperscale.config.run import Recipe
from hyperscale.config.sizes import format_size
from hyperscale.engine.ds_config import read_sharding
from hyperscale.engine.host_memory import free_memory
from hyperscale.errors import ConfigError
from hyperscale.model.backbone import open_shapes
from hyperscale.planning.run_plan import Machine, RunPlan, plan_run


@dataclass(frozen=True)
class PlanOptions:
    """Options of the command; None = not set."""

    gpus: int | None
    nodes: int
    gpu_memory: int | None
    """Bytes."""
    bandwidth: float | None
    """GB per second that one rank receives."""
    rate: float | None
    """TFLOP per second that one rank sustains."""


def plan_recipe(recipe: Recipe, options: PlanOptions) -> RunPlan:
    """Plan a recipe on `options.gpus` GPUs, or on the workers of its cluster section.

    Raises:
        HyperscaleError: the backbone or its configuration cannot be used, or the numbers do not match.
    """
    ranks = options.gpus or recipe.cluster.workers
    if ranks % options.nodes:
        raise ConfigError(f"--nodes {options.nodes}: {ranks} ranks cannot be spread evenly over them")
    is_gpu = options.gpus is not None or recipe.cluster.gpus_per_worker > 0
    changes: dict[str, Any] = {}
    if ranks != recipe.cluster.workers:
        cluster = recipe.cluster.model_copy(update={"workers": ranks})
        micro = recipe.training.micro_batch_size
        batch = -(-recipe.training.batch_size // (ranks * micro)) * ranks * micro
        changes = {"cluster": cluster, "training": recipe.training.model_copy(update={"batch_size": batch})}
    folder = open_shapes(recipe.backbone)
    if is_gpu and recipe.backbone.attention == "auto" and folder.has_fused_attention:
        changes["backbone"] = recipe.backbone.model_copy(update={"attention": "sdpa"})
    planned = recipe.model_copy(update=changes)
    bandwidth = options.bandwidth and options.bandwidth * 1e9
    rate = options.rate and options.rate * 1e12
    memory = options.gpu_memory or _memory_here(is_gpu, ranks // options.nodes)
    machine = Machine("cuda" if is_gpu else "cpu", ranks, options.nodes, memory, bandwidth, rate)
    return plan_run(planned, folder, read_sharding(planned.engine, ranks, machine.device, machine.nodes), machine)


def _memory_here(is_gpu: bool, ranks_a_node: int) -> int | None:
    """Return the memory of one rank on this machine in bytes, or None if it has no such device."""
    if is_gpu:
        return free_memory(torch.device("cuda", 0))[1] if torch.cuda.is_available() else None
    return free_memory(torch.device("cpu"))[0] // ranks_a_node


def render_json(plan: RunPlan) -> str:
    """Return the plan as JSON, in bytes, seconds and counts."""
    values = asdict(plan)
    for key in ("memory", "other"):
        values[key] |= {"resident": sorted(values[key]["resident"]), "total": getattr(plan, key).total}
    values["fits"] = plan.fits
    values["traffic"]["total"] = plan.traffic.total
    if plan.pace:
        values["pace"] |= {"seconds": plan.pace.seconds, "tokens_per_second": plan.pace.tokens_per_second}
    return json.dumps(values, indent=2)


def render_text(plan: RunPlan, recipe: Recipe) -> str:
    """Return the plan as text for a terminal."""
    machine, memory = plan.machine, plan.memory
    kind = "GPUs" if machine.device == "cuda" else "CPU ranks"
    stored: str = recipe.backbone.dtype
    if recipe.backbone.quantization != "none":
        stored += f" with blocks as {recipe.backbone.quantization} ({plan.block_bits:.3f} bits a weight)"
    title = (
        f"{recipe.backbone.name}: {plan.backbone_parameters:,} frozen parameters in {stored}, "
        f"{format_size(plan.backbone_bytes)} in all; "
        f"{plan.trained_parameters:,} trained; {machine.ranks} {kind} on {machine.nodes} node(s)"
    )
    if plan.expert_bytes:
        title += f"\n  experts: {format_size(plan.expert_bytes)}; {plan.active_parameters:,} parameters compute a token"
        if recipe.backbone.quantization != "none":
            title += f"\n  backbone.quantization does not cover the experts: they stay in {recipe.backbone.dtype}"
    worst = f"one rank at its worst moment ({_MOMENTS[memory.moment]})"
    lines = [title, "", worst, *_table(memory.items), _total(memory.total)]
    if machine.memory is not None:
        verdict = "fits" if plan.fits else "DOES NOT FIT"
        lines.append(f"  {verdict} in {format_size(machine.memory)}, a tenth of which stays free")
        lines.append(f"  the largest micro-batch that fits, nothing resident: {plan.largest_micro_batch}")
    share = 100 * plan.resident_numel / plan.backbone_parameters
    alternative = "without" if plan.checkpointed else "with"
    other = plan.other
    lines.append(f"  resident ({recipe.engine.resident}): {len(memory.resident)} parts, {share:.0f} % of the backbone")
    lines.append(
        f"  {alternative} activation checkpointing: {format_size(other.total)} in all, "
        f"activations {format_size(other.items['activations'])}"
    )
    lines += ["", "host memory of one node", *_table(plan.host), _total(sum(plan.host.values()))]
    received = {"gathered backbone": plan.traffic.gathers, "generator's gradients": plan.traffic.gradients}
    lines += ["", "received by one rank in a step", *_table(received), "", _pace(plan)]
    lines += [f"to make it fit: {line}" for line in plan.advice]
    return "\n".join(lines)


def _pace(plan: RunPlan) -> str:
    if plan.pace is None:
        return "give --rate and --bandwidth for the time of a step"
    hours = plan.steps * plan.pace.seconds / 3600
    return (
        f"a step: {plan.pace.compute_seconds:.2f} s computing, {plan.pace.network_seconds:.2f} s receiving; "
        f"{plan.pace.tokens_per_second:,.0f} tokens/s, {hours:.1f} h for {plan.steps:,} steps if nothing overlaps"
    )


_MOMENTS = {
    "head": "the output layer is being gathered",
    "loss": "logits and loss are there",
    "blocks": "inside a block",
    "update": "the generator's gradients are reduced",
}


def _table(items: Mapping[str, int]) -> list[str]:
    return [f"  {name:<38}{format_size(amount):>12}" for name, amount in items.items() if amount]


def _total(num_bytes: int) -> str:
    return f"  {'total':<38}{format_size(num_bytes):>12}"
