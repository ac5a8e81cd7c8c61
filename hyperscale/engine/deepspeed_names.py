"""The wall around DeepSpeed: every name of DeepSpeed's that is not public, and what this package uses it for.

DeepSpeed's public API cannot load shards without a broadcast, fetch whole blocks ahead, or keep a chosen block
gathered. No other file uses one of these names; tests/test_layers.py looks for them. `check_version` and the checks of
`convert` and `check_engine` report a name that a new version has dropped, before anything trains.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, cast

import deepspeed
import torch
from deepspeed.runtime.zero.partition_parameters import Init, ZeroParamStatus
from packaging.version import Version
from torch import Tensor, nn

from hyperscale.errors import EngineError
from hyperscale.logger import get_logger

_logger = get_logger(__name__)

VERSIONS = ("0.19.4", "0.19.8")
"""The oldest version that pyproject.toml allows, and the one that the tests run with.

With the oldest the tests of shards, gathers and names and the comparison of sharded with unsharded steps passed on two
CPU ranks, beside torch 2.13."""

_COORDINATOR_PRIVATE = "_PartitionedParameterCoordinator__"
_PREFETCH_SIZE = f"{_COORDINATOR_PRIVATE}prefetch_bucket_sz"
_STEP = f"{_COORDINATOR_PRIVATE}step_id"
_QUEUE = f"{_COORDINATOR_PRIVATE}param_queue"

NAMES = {
    "deepspeed.ops": {"__compatible_ops__": "leave the shared-memory all-reduce unbuilt"},
    "zero.Init": {"_convert_to_deepspeed_param": "shard a parameter without a broadcast"},
    "a parameter": {
        "ds_id": "recognise it on every rank",
        "ds_shape": "allocate it whole",
        "ds_numel": "count what the next fetch brings",
        "ds_status": "know whether it is gathered",
        "ds_tensor": "fill this rank's shard",
        "ds_persist": "keep it gathered",
        "ds_active_sub_modules": "keep it gathered",
        "ds_zero_partition_rank": "find where its shard begins",
        "ds_secondary_tensor": "know whether a node keeps a second set of shards (hpZ)",
        "all_gather": "fill the second set of shards (hpZ)",
        "all_gather_coalesced": "gather it, or read it from the other ranks' memory",
        "partition": "release it",
    },
    "a shard": {"final_location": "know whether it lies in memory"},
    "the engine's optimizer": {
        "get_param_coordinator": "fetch whole blocks ahead, and release one block",
        "partition_all_parameters": "release everything",
        "_remove_module_hooks": "save the hooks' time where everything stays gathered",
    },
    "the coordinator": {
        "fetch_sub_module": "see which block is about to run",
        "release_and_reset_all": "release a block",
        _PREFETCH_SIZE: "fetch whole blocks ahead",
        _STEP: "find the next block",
        _QUEUE: "find the next block",
    },
}
"""Owner -> name -> what it is used for. `step_id_last_used_at` and `param` of a queue's entries exist only once a step
has run: reading them fails loudly. `ds_quant_scale` is there only on shards that DeepSpeed quantized."""

_RESIDENT_MARKER = -1
"""Stands among the modules that use a resident parameter: DeepSpeed releases no parameter in use. Its own flag
`ds_persist` acts only while the order of modules is known: each evaluation, and the step after it, would gather
everything again."""


class Coordinator(Protocol):
    """Fetches parameters before a module runs, and releases them after it."""

    fetch_sub_module: Callable[[nn.Module, bool], None]

    def release_and_reset_all(self, module: nn.Module) -> None: ...


class ParameterOffload(Protocol):
    """Replaces the optimizer in a DeepSpeed engine that has none."""

    def get_param_coordinator(self) -> Coordinator: ...

    def partition_all_parameters(self) -> None: ...

    def _remove_module_hooks(self) -> None: ...


class DeepSpeedEngine(Protocol):
    """What this package needs of `deepspeed.initialize`'s engine."""

    @property
    def optimizer(self) -> ParameterOffload: ...


class Gather(Protocol):
    """Starts a gather of several parameters; the result's `wait` ends it."""

    def __call__(self, params: Iterable[Any], safe_mode: bool = False, quantize: bool = False) -> Any: ...


def check_version() -> None:
    """Warn of a DeepSpeed outside `VERSIONS`; every start of the engine calls this once."""
    installed = Version(deepspeed.__version__)
    if not Version(VERSIONS[0]) <= installed <= Version(VERSIONS[-1]):
        _logger.warning(
            "DeepSpeed %s is outside the versions %s to %s, whose first and last the tests ran with",
            installed,
            *VERSIONS,
        )
    _require("deepspeed.ops", deepspeed.ops)
    _require("zero.Init", Init)


def check_engine(engine: DeepSpeedEngine) -> None:
    """Raise `EngineError` if the engine lacks a name that is needed later."""
    _require("the engine's optimizer", engine.optimizer)
    _require("the coordinator", engine.optimizer.get_param_coordinator())


def _require(owner: str, thing: object) -> None:
    for name, purpose in NAMES[owner].items():
        if not hasattr(thing, name):
            raise EngineError(
                f"DeepSpeed {deepspeed.__version__} has no '{name}' on {owner}, which hyperscale needs to {purpose}. "
                f"The tests run with another version: install deepspeed=={VERSIONS[-1]}"
            )


def leave_shared_memory_reduce_unbuilt() -> None:
    """Keep DeepSpeed from compiling its CPU all-reduce: 40-110 s at first use, for the one reduction of a step."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def convert(partitioner: Init, parameter: nn.Parameter) -> None:
    """Turn a parameter into a sharded one. Its shard is empty, and no rank sends anything.

    Raises:
        EngineError: this DeepSpeed's parameters lack a name that is needed.
    """
    partitioner._convert_to_deepspeed_param(parameter)
    _require("a parameter", parameter)
    one = cast(Any, parameter)
    one.partition()
    _require("a shard", one.ds_tensor)


def shard_of(parameter: nn.Parameter) -> Tensor:
    """Return this rank's shard, 1-D, padded to the same length on every rank."""
    shard: Tensor = cast(Any, parameter).ds_tensor
    return shard


def shard_start(parameter: nn.Parameter) -> int:
    """Return the first element of this rank's shard in the flat parameter."""
    return int(cast(Any, parameter).ds_zero_partition_rank) * shard_of(parameter).numel()


def is_plain(parameter: nn.Parameter) -> bool:
    """Return whether this rank's shard lies in CPU memory once and as it is: not offloaded, quantized or under hpZ."""
    one, shard = cast(Any, parameter), cast(Any, shard_of(parameter))
    return bool(
        not parameter.requires_grad
        and shard.device.type == parameter.device.type == "cpu"
        and shard.final_location is None
        and one.ds_secondary_tensor is None
        and not hasattr(shard, "ds_quant_scale")
    )


def key_of(parameter: nn.Parameter) -> int:
    """Return the parameter's number, the same on every rank."""
    return int(cast(Any, parameter).ds_id)


def whole_shape_of(parameter: nn.Parameter) -> torch.Size:
    """Return the shape of the gathered parameter."""
    return torch.Size(cast(Any, parameter).ds_shape)


def is_away(parameter: nn.Parameter) -> bool:
    """Return whether the parameter is neither gathered nor on its way."""
    return cast(Any, parameter).ds_status is ZeroParamStatus.NOT_AVAILABLE


def mark_arriving(parameter: nn.Parameter) -> None:
    """Tell DeepSpeed that a gather of the parameter has started."""
    cast(Any, parameter).ds_status = ZeroParamStatus.INFLIGHT


def mark_gathered(parameter: nn.Parameter) -> None:
    """Tell DeepSpeed that the parameter is whole."""
    cast(Any, parameter).ds_status = ZeroParamStatus.AVAILABLE


def gather_with(parameters: Iterable[nn.Parameter], gather: Gather) -> None:
    """Replace DeepSpeed's gather of these parameters: every fetch goes through it."""
    for parameter in parameters:
        cast(Any, parameter).all_gather_coalesced = gather


def cut_second_shards(parameter: nn.Parameter) -> None:
    """Fill the second shards within a node (hpZ), which are cut from the whole; every rank must call this."""
    one = cast(Any, parameter)
    one.all_gather([one])
    one.partition([one], has_been_updated=True)


def hold(parameters: Sequence[nn.Parameter]) -> None:
    """Gather parameters for good; every rank must call this."""
    away: list[Any] = [one for one in parameters if is_away(one)]
    if away:
        away[0].all_gather_coalesced(away).wait()
    for parameter in parameters:
        one = cast(Any, parameter)
        one.ds_active_sub_modules.add(_RESIDENT_MARKER)
        one.ds_persist = True


def release(engine: DeepSpeedEngine, module: nn.Module) -> None:
    """Release the parameters of a module that are still gathered."""
    engine.optimizer.get_param_coordinator().release_and_reset_all(module)


def release_all(engine: DeepSpeedEngine) -> None:
    """Release every gathered parameter."""
    engine.optimizer.partition_all_parameters()


def remove_hooks(engine: DeepSpeedEngine) -> None:
    """Remove the hooks that fetch and release, for an engine where everything stays gathered."""
    engine.optimizer._remove_module_hooks()


def set_prefetch_sizes(engine: DeepSpeedEngine, size_for: Callable[[nn.Module, Coordinator], int]) -> None:
    """Ask, before each module runs, how many elements to fetch ahead of it."""
    coordinator = engine.optimizer.get_param_coordinator()
    fetch = coordinator.fetch_sub_module

    def run(module: nn.Module, forward: bool) -> None:
        setattr(coordinator, _PREFETCH_SIZE, size_for(module, coordinator))
        fetch(module, forward)

    coordinator.fetch_sub_module = run


def upcoming(coordinator: Coordinator) -> Iterator[tuple[int, nn.Parameter]]:
    """Yield the parameters still to be fetched in this pass, in order, each with the step that uses it.

    Steps that have passed are left out. Empty while DeepSpeed has not learnt the order.
    """
    now: int = getattr(coordinator, _STEP)
    queue: Any = getattr(coordinator, _QUEUE) or ()
    yield from ((entry.step_id_last_used_at, entry.param) for entry in queue if entry.step_id_last_used_at > now)
