"""One row per model family: the paths of its blocks and projections. No other file names a module."""

from collections.abc import Mapping
from dataclasses import dataclass

from hyperscale.config.plugins import Registry
from hyperscale.errors import BackboneError, nearest


@dataclass(frozen=True)
class Stack:
    """A sequence of equal transformer blocks."""

    name: str
    blocks: str
    """Dotted path of the ModuleList, from the model."""
    projections: Mapping[str, str]
    """Short name -> path of the linear layer, from the block. A model lacks some (gated or plain feed-forward)."""
    sublayers: Mapping[str, str]
    """Sub-layer name -> path of its last linear layer, whose output goes to the residual."""
    norms: Mapping[str, str]
    """Sub-layer name -> path of the norm before it, from the block."""
    final_norm: str
    """Path of the norm after the last block, from the model."""
    attention: str
    """Path of the self-attention, from the block."""


@dataclass(frozen=True)
class Architecture:
    """A family of backbones, as Hugging Face transformers names its parts."""

    model_type: str
    model_class: str
    is_encoder_decoder: bool
    stacks: tuple[Stack, ...]
    block_class: str
    """Class name of a block: the unit that ZeRO-3 gathers and activation checkpointing recomputes."""
    mask_argument: str
    """The name of the self-attention's mask argument."""
    rotary: str | None = None
    """Path of the module that computes rotations from position ids, if there is one."""


_LLAMA = Architecture(
    model_type="llama",
    model_class="LlamaForCausalLM",
    is_encoder_decoder=False,
    stacks=(
        Stack(
            name="decoder",
            blocks="model.layers",
            projections={
                "q": "self_attn.q_proj",
                "k": "self_attn.k_proj",
                "v": "self_attn.v_proj",
                "o": "self_attn.o_proj",
                "gate": "mlp.gate_proj",
                "up": "mlp.up_proj",
                "down": "mlp.down_proj",
            },
            sublayers={"attention": "self_attn.o_proj", "feed_forward": "mlp.down_proj"},
            norms={"attention": "input_layernorm", "feed_forward": "post_attention_layernorm"},
            final_norm="model.norm",
            attention="self_attn",
        ),
    ),
    block_class="LlamaDecoderLayer",
    mask_argument="attention_mask",
    rotary="model.rotary_emb",
)


def _t5_stack(name: str, feed_forward: int, cross: bool) -> Stack:
    attention, dense = "layer.0.SelfAttention", f"layer.{feed_forward}.DenseReluDense"
    projections = {short: f"{attention}.{short}" for short in ("q", "k", "v", "o")}
    if cross:
        projections |= {f"cross_{short}": f"layer.1.EncDecAttention.{short}" for short in ("q", "k", "v", "o")}
    projections |= {short: f"{dense}.{short}" for short in ("wi", "wi_0", "wi_1", "wo")}
    norms = {"attention": "layer.0.layer_norm", "feed_forward": f"layer.{feed_forward}.layer_norm"}
    return Stack(
        name=name,
        blocks=f"{name}.block",
        projections=projections,
        sublayers={"attention": f"{attention}.o", "feed_forward": f"{dense}.wo"},
        norms=norms | ({"cross_attention": "layer.1.layer_norm"} if cross else {}),
        final_norm=f"{name}.final_layer_norm",
        attention=attention,
    )


_T5 = Architecture(
    model_type="t5",
    model_class="T5ForConditionalGeneration",
    is_encoder_decoder=True,
    stacks=(_t5_stack("encoder", feed_forward=1, cross=False), _t5_stack("decoder", feed_forward=2, cross=True)),
    block_class="T5Block",
    mask_argument="mask",
)

ARCHITECTURES: Registry[Architecture] = Registry(
    "backbone family", "hyperscale.families", {row.model_type: row for row in (_LLAMA, _T5)}
)


def register_family(row: Architecture) -> None:
    """Add a family of backbones, for every model whose config.json has the row's `model_type`.

    `dataclasses.replace(architecture_of("llama"), …)` is enough for a family that names its layers as LLaMA does.

    Raises:
        PluginError: the `model_type` is taken.
    """
    ARCHITECTURES.register(row.model_type, row)


def architecture_of(model_type: str) -> Architecture:
    """Return the row of a family.

    Raises:
        BackboneError: there is no such row.
        PluginError: there is no such row, and a plug-in that might add it cannot be loaded.
    """
    row = ARCHITECTURES.find(model_type)
    if row is None:
        raise BackboneError(
            f"backbones of type '{model_type}' are not supported; supported: {', '.join(ARCHITECTURES)}."
            f"{nearest(model_type, ARCHITECTURES)} A new family is one row: see hyperscale.register_family"
        )
    return row
