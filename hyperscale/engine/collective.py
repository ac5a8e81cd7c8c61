"""What ranks send each other outside the backbone."""

from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class Collective(Protocol):
    """A group of ranks. Every rank must call every method but `rank` and `world_size`, in the same order."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def sum(self, tensor: Tensor) -> None:
        """Replace `tensor` on every rank by the sum over ranks; bitwise equal everywhere."""
        ...

    def anyone(self, flag: bool) -> bool:
        """Return whether any rank's flag is set."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's picklable value, in rank order."""
        ...

    def from_first(self, value: Any) -> Any:
        """Return rank 0's picklable value."""
        ...

    def barrier(self) -> None:
        """Wait for all ranks."""
        ...


class SingleProcess:
    """A group of one rank, which sends nothing."""

    rank = 0
    world_size = 1

    def sum(self, tensor: Tensor) -> None:
        """Leave the tensor as it is."""

    def anyone(self, flag: bool) -> bool:
        return flag

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def from_first(self, value: Any) -> Any:
        return value

    def barrier(self) -> None:
        """Return at once."""


class TorchCollective:
    """The default torch.distributed group, gloo or NCCL."""

    def __init__(self, device: torch.device) -> None:
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self._device = device

    def sum(self, tensor: Tensor) -> None:
        dist.all_reduce(tensor)

    def anyone(self, flag: bool) -> bool:
        total = torch.tensor(int(flag), device=self._device)
        dist.all_reduce(total)
        return bool(total.item())

    def gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def from_first(self, value: Any) -> Any:
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def barrier(self) -> None:
        self.anyone(False)
