"""How the weights of a step come about: those of all sites in one call, or those of each site where it acts."""

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
        """Return what one micro-batch takes its weights from."""
        ...

    def backward(self) -> None:
        """Send the gradients that the micro-batches have left through the generator; once, after the last."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of what is made before the first micro-batch."""
        ...

    def held_bytes(self, itemsize: int) -> int:
        """Bytes of that with its gradients, and with the copy in a backbone's dtype that acts."""
        ...


class _DetachedWeights:
    """Tensors cut off from the generator's graph; what stands in their place collects gradients in fp32."""

    def __init__(self, made: Weights) -> None:
        self.made = made
        self._leaves = as_leaves(made)

    def backward(self) -> None:
        backward(self.made, self._leaves)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in tensors_of(self.made))


class EagerGeneration(_DetachedWeights):
    """All sites' weights from one batched call, as a generator returns them; they collect the gradients."""

    def source(self, dtype: torch.dtype) -> Source:
        return split_by_site(cast(self._leaves, dtype))

    def held_bytes(self, itemsize: int) -> int:
        return self.nbytes * 2 + self.nbytes // 4 * itemsize


class PerSiteGeneration(_DetachedWeights):
    """Each site's weights from its code, where the site acts.

    Inside a checkpointed block they are made again in the backward pass, and neither they nor their gradients outlive
    the site. What outlives it, and collects gradients, are the codes.
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
    """Weights that are kept beside a generation of the other groups."""

    def __init__(self, generation: Generation, kept: Weights) -> None:
        self._generation, self._kept = generation, EagerGeneration(kept)

    def source(self, dtype: torch.dtype) -> Source:
        generated, kept = self._generation.source(dtype), self._kept.source(dtype)
        return lambda group, index: kept(group, index) if group in self._kept.made else generated(group, index)

    def backward(self) -> None:
        self._generation.backward()
        self._kept.backward()

    @property
    def nbytes(self) -> int:
        return self._generation.nbytes + self._kept.nbytes

    def held_bytes(self, itemsize: int) -> int:
        return self._generation.held_bytes(itemsize) + self._kept.held_bytes(itemsize)


def split_by_site(weights: Weights) -> Source:
    """Cut tensors [K, S, …] into their sites', all at once.

    The backward pass then puts the sites' gradients together in one copy. Were each site to take its slice by itself,
    each would add a gradient of the size of all of them: a quarter of the step at 60 sites.
    """
    sites = {key: {name: tensor.unbind(1) for name, tensor in group.items()} for key, group in weights.items()}
    return lambda group, index: {name: tensors[index] for name, tensors in sites[group].items()}
