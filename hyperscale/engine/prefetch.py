"""Fetch whole parts ahead: while one block runs, DeepSpeed fetches the next one, and never a piece of one.

DeepSpeed fetches ahead by size alone, and the size is the same for all blocks. Where blocks differ in size, or a norm
comes before one, the size ends inside a block, which then arrives in two gathers. This module changes only the size,
before each fetch, so that it ends where a part does; streams and limits stay DeepSpeed's.
"""

from deepspeed.utils import z3_leaf_module
from torch import nn

from hyperscale.engine.deepspeed_names import (
    Coordinator,
    DeepSpeedEngine,
    is_away,
    set_prefetch_sizes,
    upcoming,
    whole_shape_of,
)


def prefetch_whole_parts(engine: DeepSpeedEngine) -> None:
    """Let DeepSpeed fetch one part ahead: the next module with a matrix, and the norms before it.

    Counted in tests/test_gathers.py: a block arrives whole, once a pass.
    """
    set_prefetch_sizes(engine, _size_ahead)


def _size_ahead(module: nn.Module, coordinator: Coordinator) -> int:
    """Return the elements to fetch ahead of a module: none for containers and norms.

    The part after them is on its way since the part before them.
    """
    is_part = any(_is_matrix(one) for one in module.parameters(recurse=z3_leaf_module(module)))
    return _missing_numel(coordinator) if is_part else 0


def _missing_numel(coordinator: Coordinator) -> int:
    """Return how many elements are still missing between the current module and the end of the next part.

    0 while DeepSpeed has not learnt the order. A part that is gathered still counts as the next one: the head is asked
    for twice in a row, and if the last block were fetched in between, it would lie beside the logits.
    """
    numel, part = 0, None
    for step, parameter in upcoming(coordinator):
        if part is not None and step != part:
            break
        if _is_matrix(parameter):
            part = step
        if is_away(parameter):
            numel += whole_shape_of(parameter).numel()
    return numel


def _is_matrix(parameter: nn.Parameter) -> bool:
    return len(whole_shape_of(parameter)) > 1
