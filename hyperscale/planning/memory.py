"""The memory of one rank of a run, item by item, from the recipe and the backbone's shapes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from hyperscale.config.run import Recipe
from hyperscale.config.sizes import parse_size
from hyperscale.model.adapted import AdaptedModel
from hyperscale.model.backbone import BackboneFolder
from hyperscale.model.generators.generator import num_parameters
from hyperscale.planning.generated import tasks_of_a_step
from hyperscale.planning.parts import Part, choose_resident, find_parts
from hyperscale.planning.trace import StepShape, Trace, build_meta_model, trace_step

_FP32 = 4
_BUCKET_BYTES = 128 * 1024 * 1024
"""One gradient all-reduce (engine/step.py)."""
RESERVE = 0.1
"""Share of a device's memory that no plan fills: fragments, evaluation, other processes."""
_MIB = 1024 * 1024
_RUNTIME_BYTES = {("cpu", 4): 24 * _MIB, ("cpu", 2): 44 * _MIB, ("cuda", 4): 1024 * _MIB, ("cuda", 2): 1024 * _MIB}
"""What a process takes for itself once it steps, by device and bytes of an element: on CPUs libraries loaded late and
communication buffers, in bf16 also oneDNN's compiled kernels (measured on a model of 2M parameters); on CUDA the
context, cuBLAS and NCCL, which no allocator of PyTorch counts. The CUDA figure was not measured by us."""


@dataclass(frozen=True)
class Sharding:
    """How ZeRO-3 spreads the backbone."""

    world_size: int
    offload: bool = False
    """Shards lie in host memory (`offload_param`)."""
    node_shards: int = 1
    """`zero_hpz_partition_size`: every group of so many ranks holds a second set of shards."""
    in_place: bool = False
    """Gathers are read from the other ranks' memory to where they belong, without messages and their buffers."""


@dataclass(frozen=True)
class Workload:
    """A run as the planner sees it: shapes and counts, independent of a machine."""

    parts: tuple[Part, ...]
    itemsize: int
    """Bytes of one element in `backbone.dtype`."""
    trained: int
    """Parameters of the generator."""
    trace: Trace


@dataclass(frozen=True)
class Gathered:
    """Bytes of gathered parameters that are not resident, at three moments."""

    arriving: int
    """While the largest part outside the blocks (head or embedding) arrives and a block is gathered."""
    at_loss: int
    """The head and the last block, which the backward pass needs next."""
    in_blocks: int
    """The block that is computing and the next one in flight."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one rank at the worst moment of a step."""

    items: Mapping[str, int]
    """What lies on the device then, in the order of a report."""
    moment: str
    """`head`: the head's weight arrives; `loss`: logits and loss are there; `blocks`: inside a block; `update`: the
    generator's gradients are reduced."""
    host: Mapping[str, int]
    """What the same rank keeps in host memory by offloading; empty otherwise."""
    resident: frozenset[str]

    @property
    def total(self) -> int:
        return sum(self.items.values())


def step_shape(recipe: Recipe) -> StepShape:
    """Return the largest micro-batch of a recipe: every row as long as `data` allows, as many tasks as possible."""
    data, rows = recipe.data, recipe.training.micro_batch_size
    tasks = tasks_of_a_step(data, recipe.training.batch_size, recipe.cluster.workers)
    return StepShape(rows, data.max_source_tokens, data.max_target_tokens, tasks)


def describe_run(recipe: Recipe, folder: BackboneFolder, shape: StepShape | None = None) -> Workload:
    """Build and trace a run on the meta device; takes seconds, reads no weights."""
    return workload_of(build_meta_model(recipe, folder), shape or step_shape(recipe))


def workload_of(model: AdaptedModel, shape: StepShape) -> Workload:
    """Trace a built meta model at one shape."""
    return Workload(
        parts=find_parts(model.backbone, model.architecture),
        itemsize=model.dtype.itemsize,
        trained=num_parameters(model.generator),
        trace=trace_step(model, shape),
    )


def plan_memory(
    workload: Workload, sharding: Sharding, resident: frozenset[str], device: Literal["cpu", "cuda"]
) -> MemoryPlan:
    """Add up one rank's memory with the named parts resident."""
    parts, itemsize, trace = workload.parts, workload.itemsize, workload.trace
    shard = sum(part.shard_bytes(sharding.world_size) for part in parts)
    second = 0
    if sharding.node_shards > 1:
        second = sum(part.shard_bytes(sharding.node_shards) for part in parts)
    # Alone, a rank's share is the whole parameter: gathering it costs nothing.
    is_free = sharding.world_size == 1 and not sharding.offload
    kept_parts = 0 if is_free else sum(part.nbytes for part in parts if part.name in resident)
    gathered = Gathered(0, 0, 0) if is_free else _gathered(parts, resident, sharding, device)
    generator = workload.trained * _FP32
    moments = {
        "head": (trace.kept, gathered.arriving),
        "loss": (trace.kept + trace.loss, gathered.at_loss),
        "blocks": (trace.kept + trace.blocks, gathered.in_blocks),
        "update": (min(generator, _BUCKET_BYTES), 0),
    }
    gradients = {name: generator if name == "update" else 0 for name in moments}
    totals = {name: sum(moment) + gradients[name] for name, moment in moments.items()}
    worst = max(totals, key=lambda name: totals[name])
    activations, buffers = moments[worst]
    of_loss = trace.loss if worst == "loss" else 0
    items = {
        "backbone shard": 0 if sharding.offload else shard,
        "second shard (hpZ)": 0 if sharding.offload else second,
        "resident parts": kept_parts,
        "gathered for use": buffers,
        "generator": generator,
        "its optimizer": 2 * generator,
        "its gradients": gradients[worst],
        "generated weights": trace.generated,
        "activations": activations - of_loss,
        "logits and loss": of_loss,
        # glibc cannot fill the hole of a freed aligned tensor with one of the same size: as much again is lost.
        "holes of the allocator": trace.small if device == "cpu" else 0,
        "runtime": _RUNTIME_BYTES[device, itemsize],
    }
    host = {"backbone shard": shard, "second shard (hpZ)": second} if sharding.offload else {}
    host |= {"checkpoints": trace.on_host} if trace.on_host else {}
    return MemoryPlan(items, worst, host, resident)


def resident_parts(resident: str, parts: Sequence[Part], spare: float) -> frozenset[str]:
    """Return the names of the parts that stay gathered.

    Args:
        resident: the setting `engine.resident`: `all`, `none`, `auto` or a size.
        spare: bytes that `auto` may fill.
    """
    if resident == "all":
        return frozenset(part.name for part in parts)
    budget = 0.0 if resident == "none" else spare if resident == "auto" else float(parse_size(resident))
    return choose_resident(parts, budget)


def scale_rows(first: Workload, second: Workload, rows: tuple[int, int], target: int) -> Workload:
    """Return the workload at `target` rows, on the line through those traced at two numbers of `rows`."""
    share = (target - rows[0]) / (rows[1] - rows[0])

    def between(low: int, high: int) -> int:
        return int(low + share * (high - low))

    one, two = first.trace, second.trace
    names = ("kept", "loss", "blocks", "small", "on_host")
    scaled = {name: between(getattr(one, name), getattr(two, name)) for name in names}
    return replace(first, trace=replace(one, **scaled))


def _gathered(parts: Sequence[Part], resident: frozenset[str], sharding: Sharding, device: str) -> Gathered:
    """Return the bytes of parts that are gathered for use, and of the buffers they arrive in.

    Several parameters arrive in one flat buffer, from which each is then copied; one alone arrives in place. gloo
    receives into a buffer of its own besides. DeepSpeed asks ahead for as many elements as the largest block has:
    where blocks are of unlike size, a request ends inside a block and takes the part after it along.
    """
    away = [part for part in parts if part.name not in resident]
    sizes = {part.nbytes for part in away if part.is_block}
    block = max(sizes, default=0)
    other = max((part.nbytes for part in away if not part.is_block), default=0)
    if sharding.in_place:
        both = other + (2 if len(sizes) > 1 else 1) * block
        return Gathered(arriving=both, at_loss=both, in_blocks=2 * block)
    copies = 2 if device == "cpu" else 1
    together = (1 + copies) * (other + block)
    return Gathered(
        arriving=together if len(sizes) > 1 else copies * other + block,
        at_loss=other + block,
        in_blocks=(1 + copies) * block,
    )
