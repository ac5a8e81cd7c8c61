"""What a rank gathers: every all-gather that DeepSpeed starts over a partitioned backbone, with its parameters."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from hyperscale.engine.deepspeed_names import is_away


@dataclass(frozen=True)
class Gather:
    """One all-gather, of one parameter or of several together."""

    names: tuple[str, ...]
    """The parameters', from the backbone; a tied weight by its first name."""
    received_bytes: int
    """What this rank gets from the others: (w - 1) / w of the parameters, padding included."""


@contextmanager
def logged_gathers(backbone: nn.Module) -> Iterator[list[Gather]]:
    """List the gathers that start inside the `with`, in their order; the list grows as they do.

    DeepSpeed fetches through a method that it hangs on every parameter, `all_gather_coalesced`; all its fetches before
    modules, ahead of modules and in the backward pass go through it, and only they.
    """
    gathers: list[Gather] = []
    names = {id(parameter): name for name, parameter in backbone.named_parameters()}
    parameters: list[Any] = list(backbone.parameters())
    before = [parameter.all_gather_coalesced for parameter in parameters]

    def logged(gather: Callable[..., Any]) -> Callable[..., Any]:
        def run(params: Iterable[Any], *args: Any, **options: Any) -> Any:
            together = sorted(params, key=lambda one: int(one.ds_id))
            gathers.append(Gather(tuple(names[id(one)] for one in together), sum(map(_received_bytes, together))))
            return gather(together, *args, **options)

        return run

    for parameter in parameters:
        parameter.all_gather_coalesced = logged(parameter.all_gather_coalesced)
    try:
        yield gathers
    finally:
        for parameter, gather in zip(parameters, before, strict=True):
            parameter.all_gather_coalesced = gather


def _received_bytes(parameter: Any) -> int:
    """Return the bytes of the other ranks' shares; with hpZ those within the group alone."""
    share, ranks = parameter.ds_tensor, parameter.ds_zero_partition_world_size
    if parameter.ds_secondary_tensor is not None:
        share, ranks = parameter.ds_secondary_tensor, parameter.ds_secondary_tensor_group_size
    return (int(ranks) - 1) * int(share.ds_numel) * int(share.element_size())


def held_elements(backbone: nn.Module) -> int:
    """Return how many backbone elements this rank holds now: its shards, and whatever is gathered."""
    parameters: list[Any] = list(backbone.parameters())
    shards = sum(one.ds_tensor.numel() for one in parameters)
    return shards + sum(one.ds_numel for one in parameters if not is_away(one))
