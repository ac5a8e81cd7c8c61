"""Generated weights: group of the site map -> name -> tensor [K, S, …] of the group's S sites in map order.

A group whose weights all tasks share has tensors [1, S, …], whatever K is.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

Weights = Mapping[str, Mapping[str, Tensor]]


def tensors_of(weights: Weights) -> Iterator[Tensor]:
    """Yield all tensors, in a fixed order."""
    for group in weights.values():
        yield from group.values()


def cast(weights: Weights, dtype: torch.dtype) -> Weights:
    """Return the weights in the backbone's dtype; gradients flow back through the cast."""
    return {key: {name: tensor.to(dtype) for name, tensor in group.items()} for key, group in weights.items()}


def as_leaves(weights: Weights) -> Weights:
    """Return detached leaves that collect the gradients of several micro-batches in fp32.

    Weights that depend on no trainable parameter (norms while only new tasks are trained) collect none.
    """
    return {
        key: {name: tensor.detach().requires_grad_(tensor.requires_grad) for name, tensor in group.items()}
        for key, group in weights.items()
    }


def backward(weights: Weights, leaves: Weights) -> None:
    """Send the gradients that `leaves` collected back through the generator of `weights`."""
    pairs = [
        (generated, leaf.grad)
        for generated, leaf in zip(tensors_of(weights), tensors_of(leaves), strict=True)
        if leaf.grad is not None
    ]
    if pairs:
        torch.autograd.backward([generated for generated, _ in pairs], [grad for _, grad in pairs])
