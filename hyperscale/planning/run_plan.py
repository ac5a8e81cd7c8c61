"""The whole plan of a run, also for a machine that is elsewhere, and what to change if the run does not fit."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from hyperscale.config.run import Recipe
from hyperscale.config.sizes import format_size
from hyperscale.model.backbone import BackboneFolder
from hyperscale.planning.memory import (
    RESERVE,
    MemoryPlan,
    Sharding,
    Workload,
    plan_memory,
    resident_parts,
    scale_rows,
    step_shape,
    workload_of,
)
from hyperscale.planning.trace import build_meta_model
from hyperscale.planning.traffic import Pace, Traffic, plan_pace, plan_traffic, step_operations

HOST_BYTES = {
    "Python, PyTorch and libraries, a rank": 600 * 2**20,
    "Ray on the node": 1500 * 2**20,
    "batches and the order of rows, a rank": 100 * 2**20,
}
"""A worker after its imports: 594 MiB measured on CPUs. Ray: its head and an idle worker pool with a small object
store. Encoded rows are mapped from the cache, and the page cache holds them once. A rank keeps a row's length and its
place in the order of the epoch, at most 6 bytes: 100 MiB are ten million rows and the batches."""


@dataclass(frozen=True)
class Machine:
    """Where a run is planned to go."""

    device: Literal["cpu", "cuda"]
    ranks: int
    nodes: int
    memory: int | None
    """Bytes of one rank's device, or None where unknown: then the plan does not state whether the run fits."""
    bandwidth: float | None
    """Bytes a second that one rank receives from the others."""
    rate: float | None
    """Operations a second that one rank sustains."""


@dataclass(frozen=True)
class RunPlan:
    """Everything `hyperscale plan` prints."""

    machine: Machine
    backbone_parameters: int
    backbone_bytes: int
    """As it is stored: whole, without padding."""
    block_bits: float
    """Stored bits for each weight of the blocks, scales and norms among them."""
    trained_parameters: int
    active_parameters: int
    """Frozen parameters that compute one token: all but the experts that are not chosen."""
    expert_bytes: int
    """Of the whole backbone's experts; 0 without any."""
    memory: MemoryPlan
    other: MemoryPlan
    """The same with activation checkpointing turned the other way."""
    checkpointed: bool
    resident_numel: int
    host: Mapping[str, int]
    """Bytes of one node."""
    traffic: Traffic
    pace: Pace | None
    steps: int
    largest_micro_batch: int | None
    advice: tuple[str, ...]

    @property
    def fits(self) -> bool | None:
        limit = self.machine.memory
        return None if limit is None else self.memory.total <= limit * (1 - RESERVE)


def plan_run(recipe: Recipe, folder: BackboneFolder, sharding: Sharding, machine: Machine) -> RunPlan:
    """Plan a recipe on `machine`; traces the model at two sizes of micro-batch, with and without checkpointing."""
    shape = step_shape(recipe)
    rows = (shape.rows, 2 * shape.rows)
    both: dict[bool, tuple[Workload, Workload]] = {}
    for checkpointed in (False, True):
        engine = recipe.engine.model_copy(update={"activation_checkpointing": checkpointed})
        model = build_meta_model(recipe.model_copy(update={"engine": engine}), folder)
        low, high = (workload_of(model, replace(shape, rows=count)) for count in rows)
        both[checkpointed] = (low, high)
    limit = None if machine.memory is None else machine.memory * (1 - RESERVE)
    chosen = recipe.engine.activation_checkpointing

    workload = both[chosen][0]
    bare = plan_memory(workload, sharding, frozenset(), machine.device)
    spare = 0.0 if limit is None else limit - bare.total
    resident = resident_parts(recipe.engine.resident, workload.parts, spare)
    memory, other = (plan_memory(both[way][0], sharding, resident, machine.device) for way in (chosen, not chosen))
    micro_batches = max(1, recipe.training.batch_size // (machine.ranks * shape.rows))
    traffic = plan_traffic(workload, sharding, memory.resident, micro_batches)
    pace = None
    if machine.rate and machine.bandwidth:
        operations = micro_batches * step_operations(workload, shape, chosen)
        tokens = machine.ranks * micro_batches * shape.rows * (shape.source_tokens + shape.target_tokens)
        pace = plan_pace(operations, traffic, tokens, machine.rate, machine.bandwidth)

    def bare_total(pair: tuple[Workload, Workload], count: int) -> int:
        scaled = scale_rows(*pair, rows, count)
        return plan_memory(scaled, sharding, frozenset(), machine.device).total

    blocks = [part for part in workload.parts if part.is_block]
    largest = None if limit is None else _largest(lambda count: bare_total(both[chosen], count) <= limit)
    advice: list[str] = []
    if limit is not None and memory.total > limit:
        advice = _advice(recipe, memory, other, largest, limit, sharding)
    return RunPlan(
        machine=machine,
        backbone_bytes=sum(part.nbytes for part in workload.parts),
        block_bits=8 * sum(part.nbytes for part in blocks) / sum(part.weights for part in blocks),
        backbone_parameters=sum(part.weights for part in workload.parts),
        trained_parameters=workload.trained,
        active_parameters=round(sum(part.active_weights for part in workload.parts)),
        expert_bytes=sum(part.expert_bytes for part in workload.parts),
        memory=memory,
        other=other,
        checkpointed=chosen,
        resident_numel=sum(part.weights for part in workload.parts if part.name in memory.resident),
        host=_host(machine, memory),
        traffic=traffic,
        pace=pace,
        steps=recipe.training.steps,
        largest_micro_batch=largest,
        advice=tuple(advice),
    )


def _largest(fits: Callable[[int], bool]) -> int:
    """Return the largest number of rows that fits, 0 if none does; doubling, then halving the gap."""
    if not fits(1):
        return 0
    low, high = 1, 2
    while fits(high) and high < 2**20:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _host(machine: Machine, memory: MemoryPlan) -> dict[str, int]:
    """Return the memory of one node outside its devices; of a run on CPUs that is all of it."""
    ranks = -(-machine.ranks // machine.nodes)
    host = {name: amount * (1 if name.startswith("Ray") else ranks) for name, amount in HOST_BYTES.items()}
    host |= {f"{name}, offloaded": amount * ranks for name, amount in memory.host.items() if amount}
    if machine.device == "cpu":
        host["the ranks' own, as above"] = memory.total * ranks
    return host


def _advice(
    recipe: Recipe, memory: MemoryPlan, other: MemoryPlan, largest: int | None, limit: float, sharding: Sharding
) -> list[str]:
    """Return changes that would make the run fit, the cheapest first."""
    advice = []
    checkpointed = recipe.engine.activation_checkpointing
    generated = memory.items["generated weights"]
    if checkpointed and recipe.adaptation.generator.generates_by_site and generated > limit / 10:
        advice.append(f"engine.generated_budget=0B: no site then keeps its part of {format_size(generated)}")
    if memory.items["resident parts"] and memory.total - memory.items["resident parts"] <= limit:
        advice.append("engine.resident=auto keeps no more gathered than fits")
    if not checkpointed and other.total < memory.total:
        fits = "fits then" if other.total <= limit else "is still too much"
        advice.append(f"engine.activation_checkpointing=true: {format_size(other.total)}, which {fits}")
    if largest:
        advice.append(f"training.micro_batch_size={largest} is the largest that fits as it is")
    shard = memory.items["backbone shard"] + memory.items["second shard (hpZ)"]
    if shard > limit / 2 and not sharding.offload:
        advice.append("more workers, or engine.ds_config=zero3_offload: the shards alone take more than half")
    return advice or ["more workers, a smaller backbone, or shorter data.max_source_tokens"]
