"""Which parts of a backbone stay gathered. All ranks keep the same parts, as many as the rank with least memory can."""

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from hyperscale.config.engine import EngineSettings
from hyperscale.engine.collective import Collective
from hyperscale.engine.ds_config import read_sharding
from hyperscale.engine.host_memory import free_memory
from hyperscale.logger import get_logger
from hyperscale.planning.memory import RESERVE, Workload, plan_memory, resident_parts
from hyperscale.planning.parts import Part

_logger = get_logger(__name__)


@dataclass(frozen=True)
class Residency:
    """What the ranks of a run have agreed on."""

    parts: frozenset[str]
    """Names of the parts that stay gathered."""
    returns_memory: bool
    """Whether memory that a step frees returns to the system: on CPUs, unless the recipe asks for speed or there is
    plenty."""


def agree_on_resident(
    engine: EngineSettings,
    describe_workload: Callable[[], Workload],
    parts: Sequence[Part],
    collective: Collective,
    device: torch.device,
) -> Residency:
    """Return what to keep; every rank must call this once its shards are loaded.

    `auto` fills the memory that is free now, except a tenth of all and what the plan adds for a step. If there is room
    for all parts and the whole plan a second time, the C library keeps what is freed, as with `all`: a step of `all`
    took 1.7 times the plan (docs/performance.md).
    """
    is_cpu = device.type == "cpu"
    if engine.resident != "auto":
        return Residency(resident_parts(engine.resident, parts, spare=0.0), is_cpu and engine.resident != "all")
    workload = describe_workload()
    names = collective.gather(socket.gethostname())
    sharding = read_sharding(engine, collective.world_size, _kind(device), len(set(names)))
    plan = plan_memory(workload, sharding, frozenset(), _kind(device))
    held = plan.items["backbone shard"] + plan.items["second shard (hpZ)"]
    sharers = 1 if device.type == "cuda" else names.count(names[collective.rank])
    free, total = free_memory(device)
    spare = min(collective.gather((free - RESERVE * total) / sharers - (plan.total - held)))
    chosen = resident_parts(engine.resident, parts, spare)
    is_roomy = len(chosen) == len(parts) and spare - sum(part.nbytes for part in parts) >= plan.total
    if collective.rank == 0:
        _logger.info("engine.resident: %d of %d parts of the backbone stay gathered", len(chosen), len(parts))
    return Residency(chosen, is_cpu and not is_roomy)


def _kind(device: torch.device) -> Literal["cpu", "cuda"]:
    return "cuda" if device.type == "cuda" else "cpu"
