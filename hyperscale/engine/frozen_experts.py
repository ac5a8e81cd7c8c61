"""Frozen experts whose weights ZeRO-3 may release between the forward and the backward pass.

transformers multiplies with views of the experts' parameters, and autograd keeps the views: their storage would outlive
the release of the parameters, so that every gathered block would stay until its backward pass. Here autograd keeps only
where a view lies in which parameter. The products stay transformers' own.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from hyperscale.model.architectures import Architecture


class _View(NamedTuple):
    """Where a view lies in a parameter of the experts."""

    parameter: str
    size: torch.Size
    stride: tuple[int, ...]
    offset: int
    """Elements after the parameter's first one."""


def forget_expert_weights(backbone: nn.Module, architecture: Architecture) -> None:
    """Let the experts of every block run as above; the weights must be gathered in the backward pass.

    Blocks that run again in the backward pass keep nothing between the passes, and must not do this: checkpointing
    hands over what autograd keeps in the same way, and only one of the two would be asked.
    """
    for stack in architecture.stacks:
        if stack.experts is None:
            continue
        for block in backbone.get_submodule(stack.blocks).children():
            experts: Any = dict(block.named_modules()).get(stack.experts.path)
            if experts is not None:
                experts.forward = partial(_run, experts, experts.forward)


def _run(experts: nn.Module, forward: Any, *args: Any, **options: Any) -> Tensor:
    with saved_tensors_hooks(partial(_pack, experts), partial(_unpack, experts)):
        output: Tensor = forward(*args, **options)
    return output


def _pack(experts: nn.Module, saved: Tensor) -> Tensor | _View:
    for name, parameter in experts.named_parameters():
        offset = int(saved.storage_offset() - parameter.storage_offset())
        if (
            saved.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()
            and saved.dtype == parameter.dtype
            and 0 <= offset < parameter.numel()
        ):
            return _View(name, saved.size(), saved.stride(), offset)
    return saved


def _unpack(experts: nn.Module, packed: Tensor | _View) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    parameter = experts.get_parameter(packed.parameter)
    return parameter.detach().as_strided(packed.size, packed.stride, parameter.storage_offset() + packed.offset)
