"""Whole parts ahead: while one block is at work DeepSpeed fetches the next, and never a piece of one.

DeepSpeed fetches ahead by size alone, the same for all. Where blocks are of unlike size, or a norm comes before one,
the size ends inside a block, which then arrives in two gathers. It stays DeepSpeed's prefetch, with its streams and its
limit; only the size is set anew before each fetch, so that it ends where a part does.
"""

from collections.abc import Callable
from typing import Any

from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import z3_leaf_module
from torch import nn

_PRIVATE = "_PartitionedParameterCoordinator__"


def prefetch_whole_parts(coordinator: Any) -> None:
    """Let DeepSpeed's coordinator fetch one part ahead: the next module with a matrix, and the norms before it.

    Counted in tests/test_gathers.py: a block comes whole, once a pass. There is no public way to do it; DeepSpeed's
    private names are the same in 0.19.4 and 0.19.8.
    """
    fetch: Callable[..., None] = coordinator.fetch_sub_module

    def run(module: nn.Module, forward: bool) -> None:
        # Containers and norms fetch nothing ahead: the part after them is on its way since the one before them.
        is_part = any(_is_matrix(one) for one in module.parameters(recurse=z3_leaf_module(module)))
        setattr(coordinator, f"{_PRIVATE}prefetch_bucket_sz", _next_numel(coordinator) if is_part else 0)
        fetch(module, forward)

    coordinator.fetch_sub_module = run


def _next_numel(coordinator: Any) -> int:
    """Return the elements that lack from the module at work to the end of the next part; 0 while no order is known.

    A part that is gathered counts as the next one all the same: the head is asked for twice in a row, and fetching the
    last block in between would have it lie beside the logits.
    """
    now: int = getattr(coordinator, f"{_PRIVATE}step_id")
    queue: Any = getattr(coordinator, f"{_PRIVATE}param_queue") or ()
    numel, part = 0, None
    for entry in queue:
        step, parameter = entry.step_id_last_used_at, entry.param
        if step <= now:
            continue
        if part is not None and step != part:
            break
        if _is_matrix(parameter):
            part = step
        if parameter.ds_status is ZeroParamStatus.NOT_AVAILABLE:
            numel += parameter.ds_numel
    return numel


def _is_matrix(parameter: Any) -> bool:
    return len(parameter.ds_shape) > 1
