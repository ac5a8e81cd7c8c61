"""What a step sends and how long it takes: bytes over the network, operations, tokens a second."""

from dataclasses import dataclass

from hyperscale.planning.memory import Sharding, Workload
from hyperscale.planning.trace import StepShape

_FP32 = 4


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank receives in an optimizer step."""

    gathers: int
    """Parts of the backbone that are not resident."""
    gradients: int
    """The all-reduce of the generator's gradients: a ring moves each byte twice."""

    @property
    def total(self) -> int:
        return self.gathers + self.gradients


@dataclass(frozen=True)
class Pace:
    """Time of an optimizer step if nothing overlaps: computing, then communicating."""

    compute_seconds: float
    network_seconds: float
    tokens: int
    """Tokens of an optimizer step over all ranks, at the recipe's longest."""

    @property
    def seconds(self) -> float:
        return self.compute_seconds + self.network_seconds

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def plan_traffic(workload: Workload, sharding: Sharding, resident: frozenset[str], micro_batches: int) -> Traffic:
    """Count received bytes: (w − 1)/w · Σ gathers · bytes of the parts that are not resident, for every micro-batch.

    With hpZ, w is the number of ranks in a node's group: its second set of shards serves all gathers.
    """
    world = sharding.world_size
    group = sharding.node_shards if sharding.node_shards > 1 else world
    passes = sum(part.gathers * part.nbytes for part in workload.parts if part.name not in resident)
    return Traffic(
        gathers=micro_batches * passes * (group - 1) // group,
        gradients=2 * workload.trained * _FP32 * (world - 1) // world,
    )


def step_operations(workload: Workload, shape: StepShape, checkpointed: bool) -> float:
    """Return the operations of one micro-batch on one rank: 2 forward and 2 backward (no weight gradients) an element
    and token, 2 more where blocks run again; the head at label positions only, and of the experts those chosen.
    Attention's own products and the adapters are left out.
    """
    again = 2 if checkpointed else 0
    lengths = {"encoder": shape.source_tokens, "decoder": shape.target_tokens}
    operations = 0.0
    for part in workload.parts:
        if part.is_block:
            stack = part.name.partition(".")[0]
            length = lengths.get(stack, shape.source_tokens + shape.target_tokens)
            operations += (4 + again) * part.active_weights * shape.rows * length
        elif part.gathers > 1 and part.weights >= 2**16:
            operations += 4 * part.weights * shape.rows * shape.target_tokens
    return operations


def plan_pace(operations: float, traffic: Traffic, tokens: int, rate: float, bandwidth: float) -> Pace:
    """Return the time of an optimizer step.

    Args:
        operations: of one rank in the step.
        tokens: of the step, over all ranks.
        rate: operations a second that one rank sustains, measured or given.
        bandwidth: bytes a second that one rank receives.
    """
    return Pace(operations / rate, traffic.total / bandwidth, tokens)
