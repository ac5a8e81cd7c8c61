"""Keeps what checkpointed blocks are computed again from in host memory, until the backward pass needs it."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

Blocks = Callable[..., Any]


@dataclass(eq=False)
class _OnHost:
    """A tensor that has left its device; on the meta device, only its shape."""

    copy: Tensor | None
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


class HostCheckpoints:
    """Moves the inputs of checkpointed blocks to pinned host memory and back, on the stream that computes.

    `num_bytes` is what lies there now. On CPUs, where nothing would be gained, inputs stay where they are.
    """

    def __init__(self, backbone: nn.Module) -> None:
        """`backbone` has its activation checkpointing turned on."""
        self.num_bytes = 0
        for module in backbone.modules():
            run: Any = getattr(module, "_gradient_checkpointing_func", None)
            if run is not None:
                module._gradient_checkpointing_func = partial(self._run, run)  # type: ignore[assignment]

    def _run(self, run: Blocks, block: Blocks, *args: Any) -> Any:
        # Inside the block the hooks of PyTorch's checkpoint are in force: ours see its inputs alone.
        with torch.autograd.graph.saved_tensors_hooks(partial(self._leave, args[0].shape), self._return):
            return run(block, *args)

    def _leave(self, hidden: torch.Size, tensor: Tensor) -> Tensor | _OnHost:
        # What many blocks share stays on the device: masks, T5's position biases.
        if _stays(tensor) or tensor.shape != hidden:
            return tensor
        on_host = _OnHost(_copied(tensor), tensor.shape, tensor.dtype, tensor.device)
        self._add(tensor.nbytes)
        weakref.finalize(on_host, self._add, -tensor.nbytes)
        return on_host

    def _return(self, saved: Tensor | _OnHost) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        tensor = torch.empty(saved.shape, dtype=saved.dtype, device=saved.device)
        return tensor if saved.copy is None else tensor.copy_(saved.copy, non_blocking=True)

    def _add(self, num_bytes: int) -> None:
        self.num_bytes += num_bytes


def _stays(tensor: Tensor) -> bool:
    """Return whether a tensor stays where it is: on a CPU, or an embedding's output, which needs no gradient."""
    return tensor.is_cpu or not tensor.requires_grad


def _copied(tensor: Tensor) -> Tensor | None:
    if tensor.is_meta:
        return None
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return copy.copy_(tensor, non_blocking=True)


def keep_on_host(backbone: nn.Module) -> None:
    """Keep the checkpoints of a backbone in host memory; its activation checkpointing is on."""
    cast(Any, backbone).checkpoints_on_host = HostCheckpoints(backbone)


def bytes_on_host(backbone: nn.Module) -> int:
    """Return the bytes of checkpoints that lie in host memory now."""
    checkpoints: HostCheckpoints | None = getattr(backbone, "checkpoints_on_host", None)
    return checkpoints.num_bytes if checkpoints else 0
