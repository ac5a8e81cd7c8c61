"""What a row of the table of families says about a backbone: the paths of its blocks, projections and norms."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

NORMS = ("attention", "cross_attention", "feed_forward", "q", "k", "attention_output", "feed_forward_output")
"""The names of a block's norms: those before a sub-layer, those of queries and keys, those after a sub-layer."""
FUSED_QKV = "qkv"
"""The short name of one projection that makes queries, keys and values, in this order."""


@dataclass(frozen=True)
class Experts:
    """Feed-forward networks of a block, of which a router chooses some for each token. No adapter acts on them."""

    path: str
    """Path of the module that holds the weights of all of them, as parameters [experts, …], from the block."""
    total: str
    """The field of the configuration that counts the experts of a block."""
    chosen: str = "num_experts_per_tok"
    """The field that counts those which compute a token."""


@dataclass(frozen=True)
class Stack:
    """A sequence of equal transformer blocks."""

    name: str
    blocks: str
    """Dotted path of the ModuleList, from the model."""
    projections: Mapping[str, str]
    """Short name -> path of the linear layer, from the block. A model lacks some (gated or plain feed-forward)."""
    sublayers: Mapping[str, str]
    """Sub-layer name -> path of its last linear layer. Its output goes to the residual, in some families through a norm
    or a factor."""
    norms: Mapping[str, str]
    """One of `NORMS` -> path of the norm, from the block."""
    final_norm: str
    """Path of the norm after the last block, from the model."""
    attention: str
    """Path of the self-attention, from the block."""
    untouched: frozenset[str] = frozenset()
    """Paths of linear layers and norms of a block on which no adapter acts, from the block."""
    experts: Experts | None = None
    """The experts of the blocks that have any."""

    def __post_init__(self) -> None:
        unknown = sorted(set(self.norms) - set(NORMS))
        if unknown:
            raise ValueError(f"norms of the stack '{self.name}': unknown name {unknown[0]}; known: {', '.join(NORMS)}")


@dataclass(frozen=True)
class Architecture:
    """A family of backbones, as Hugging Face transformers names its parts."""

    model_type: str
    model_class: str
    is_encoder_decoder: bool
    stacks: tuple[Stack, ...]
    block_class: str
    """Class name of a block: the unit that ZeRO-3 gathers and activation checkpointing recomputes."""
    mask_argument: str = "attention_mask"
    """The name of the self-attention's mask argument."""
    rotary: str | None = None
    """Path of the module that computes rotations from position ids, if there is one."""
    may_slide: bool = False
    """Whether some models of the family attend within a sliding window, in some or all blocks."""
    may_untie_head: bool = False
    """Whether a checkpoint may hold a head of its own although transformers' configuration always ties it."""
    stored: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Regular expression of a parameter's name -> templates of the names that checkpoints have for its parts, where
    transformers joins or renames them. `{expert}` counts from 0, and the parts follow each other expert by expert."""
    is_part: bool = False
    """Whether the paths lead into a larger model, whose other layers may have the same names."""
