"""The parts of a backbone that ZeRO-3 gathers at one time, and which of them may stay gathered."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from hyperscale.model.architectures import Architecture
from hyperscale.model.quantized.blocks import num_weights
from hyperscale.model.shapes import whole_numel


@dataclass(frozen=True)
class Part:
    """A transformer block, or what one module outside the blocks owns (an embedding, a norm, the head)."""

    name: str
    """Dotted path of the module in the backbone."""
    numels: tuple[int, ...]
    """Elements of each of its parameters, whole."""
    itemsizes: tuple[int, ...]
    """Bytes of an element of each."""
    weights: int
    """Weights that the parameters stand for: of quantized ones the weights before it, without scales."""
    gathers: int
    """How often a forward and backward pass gathers it when it is not resident: blocks, norms and the head in both, an
    input embedding in the forward pass alone, a tied embedding at most three times."""
    is_block: bool
    expert_numel: int = 0
    """Elements of its experts, which are among `numels`."""
    expert_bytes: int = 0
    chosen_share: float = 1.0
    """Share of the experts that computes one token."""

    @property
    def numel(self) -> int:
        return sum(self.numels)

    @property
    def active_weights(self) -> float:
        """Weights that one token is multiplied with: all but the experts that are not chosen for it."""
        return self.weights - (1 - self.chosen_share) * self.expert_numel

    @property
    def nbytes(self) -> int:
        return sum(numel * size for numel, size in zip(self.numels, self.itemsizes, strict=True))

    def shard_bytes(self, world_size: int) -> int:
        """Return the bytes of one rank's shard: each parameter is padded to a multiple of the ranks."""
        return sum(-(-numel // world_size) * size for numel, size in zip(self.numels, self.itemsizes, strict=True))


def find_parts(backbone: nn.Module, architecture: Architecture) -> tuple[Part, ...]:
    """List the parts of a backbone, each parameter once, in model order; parameters may be on meta or partitioned."""
    blocks = [
        f"{stack.blocks}.{index}"
        for stack in architecture.stacks
        for index, _ in enumerate(backbone.get_submodule(stack.blocks).children())
    ]
    head: Any = backbone.get_output_embeddings()  # type: ignore[operator]
    inside = tuple(f"{block}." for block in blocks)
    parts: list[Part] = []
    known: set[int] = set()
    for name, module in backbone.named_modules():
        if name.startswith(inside):
            continue
        own = [one for one in module.parameters(recurse=name in blocks) if id(one) not in known]
        known.update(map(id, own))
        if own:
            tied = isinstance(module, nn.Embedding) and head.weight is module.weight
            gathers = 3 if tied else 1 if isinstance(module, nn.Embedding) else 2
            sizes = tuple(one.element_size() for one in own)
            numels = tuple(map(whole_numel, own))
            part = Part(name, numels, sizes, num_weights(module, own), gathers, name in blocks)
            parts.append(_with_experts(part, module, architecture, backbone.config) if part.is_block else part)
    return tuple(parts)


def _with_experts(part: Part, block: nn.Module, architecture: Architecture, config: Any) -> Part:
    """Return the part of a block with what its experts hold, if it has any."""
    experts = next((stack.experts for stack in architecture.stacks if part.name.startswith(f"{stack.blocks}.")), None)
    module = dict(block.named_modules()).get(experts.path) if experts else None
    if experts is None or module is None:
        return part
    own = list(module.parameters())
    return replace(
        part,
        expert_numel=sum(map(whole_numel, own)),
        expert_bytes=sum(whole_numel(one) * one.element_size() for one in own),
        chosen_share=getattr(config, experts.chosen) / getattr(config, experts.total),
    )


def choose_resident(parts: Sequence[Part], budget: float) -> frozenset[str]:
    """Return the names of the parts to keep gathered within `budget` bytes.

    Most gathers saved a byte first: the norms (tiny, and a gather each), a tied embedding, the blocks in order, the
    head, an input embedding. What no longer fits is left out and smaller ones after it are still taken, so that the
    same budget gives the same parts on every rank.
    """
    order = sorted(parts, key=lambda part: (not _is_small(part), -part.gathers, not part.is_block))
    chosen: list[str] = []
    for part in order:
        if part.nbytes <= budget:
            budget -= part.nbytes
            chosen.append(part.name)
    return frozenset(chosen)


def _is_small(part: Part) -> bool:
    return len(part.numels) == 1 and not part.is_block and part.numel < 2**16
