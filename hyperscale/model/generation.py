"""How the weights of a step are generated: all sites in one call, or each site when it acts."""

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from hyperscale.model.weights import Weights, as_leaves, backward, cast, tensors_of

Source = Callable[[str, int], Mapping[str, Tensor]]
"""Group of a site map, number of a site in it -> its named tensors [K, …], or [1, …] where the K tasks share them.

In the backbone's dtype."""


class Generation(Protocol):
    """The weights of a step's K tasks, for all its micro-batches."""

    def source(self, dtype: torch.dtype) -> Source:
        """Return the weights of one micro-batch by site."""
        ...

    def backward(self) -> None:
        """Send the gradients of all micro-batches through the generator. Call this once, after the last micro-batch."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors generated before the first micro-batch."""
        ...

    def held_bytes(self, itemsize: int) -> int:
        """Bytes of these tensors, their gradients, and the copy in the backbone's dtype that the adapters use."""
        ...


class _DetachedWeights:
    """Generated tensors, and detached leaves in their place that collect gradients in fp32."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self._leaves = as_leaves(weights)

    def backward(self) -> None:
        backward(self.weights, self._leaves)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in tensors_of(self.weights))


class EagerGeneration(_DetachedWeights):
    """All sites' weights from one batched call of a generator."""

    def source(self, dtype: torch.dtype) -> Source:
        return split_by_site(cast(self._leaves, dtype))

    def held_bytes(self, itemsize: int) -> int:
        return self.nbytes * 2 + self.nbytes // 4 * itemsize


class PerSiteGeneration(_DetachedWeights):
    """Each site's weights, generated from its code when the site acts.

    A checkpointed block generates them again in the backward pass. Neither they nor their gradients outlive the site;
    only the codes do, and they collect the gradients.
    """

    def __init__(
        self, codes: Mapping[str, Tensor], make: Callable[[str, int, Mapping[str, Tensor]], Mapping[str, Tensor]]
    ) -> None:
        """`make`: group, number of the site, codes -> fp32 tensors [K, …]."""
        super().__init__({"codes": codes})
        self._make = make

    def source(self, dtype: torch.dtype) -> Source:
        codes = self._leaves["codes"]
        return lambda group, index: {name: tensor.to(dtype) for name, tensor in self._make(group, index, codes).items()}

    def held_bytes(self, itemsize: int) -> int:
        return self.nbytes * 2


class CombinedGeneration:
    """Stored weights of some groups, and a generation of the others."""

    def __init__(self, generation: Generation, kept: Weights) -> None:
        self._generation, self._kept = generation, EagerGeneration(kept)

    def source(self, dtype: torch.dtype) -> Source:
        generated, kept = self._generation.source(dtype), self._kept.source(dtype)
        return lambda group, index: kept(group, index) if group in self._kept.weights else generated(group, index)

    def backward(self) -> None:
        self._generation.backward()
        self._kept.backward()

    @property
    def nbytes(self) -> int:
        return self._generation.nbytes + self._kept.nbytes

    def held_bytes(self, itemsize: int) -> int:
        return self._generation.held_bytes(itemsize) + self._kept.held_bytes(itemsize)


def split_by_site(weights: Weights) -> Source:
    """Split tensors [K, S, …] into those of each site, all sites at once.

    The backward pass then joins the sites' gradients in one copy. If each site took its own slice, each would add a
    gradient as large as that of all sites: at 60 sites this took a quarter of the step.
    """
    sites = {key: {name: tensor.unbind(1) for name, tensor in group.items()} for key, group in weights.items()}
    return lambda group, index: {name: tensors[index] for name, tensors in sites[group].items()}
