"""LLaMA, and the decoder-only families that name their layers as it does."""

from collections.abc import Mapping
from dataclasses import replace

from hyperscale.model.families.table import Architecture, Stack

DECODER = Stack(
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
)
QUERY_AND_KEY_NORMS: Mapping[str, str] = {"q": "self_attn.q_norm", "k": "self_attn.k_norm"}


def decoder_only(model_type: str, stem: str, decoder: Stack = DECODER, may_slide: bool = False) -> Architecture:
    """Return the row of a family whose classes begin with `stem`: `LlamaForCausalLM`, `LlamaDecoderLayer`."""
    return Architecture(
        model_type=model_type,
        model_class=f"{stem}ForCausalLM",
        is_encoder_decoder=False,
        stacks=(decoder,),
        block_class=f"{stem}DecoderLayer",
        rotary="model.rotary_emb",
        may_slide=may_slide,
    )


def with_norms(norms: Mapping[str, str]) -> Stack:
    """Return LLaMA's decoder with other norms."""
    return replace(DECODER, norms=norms)


LLAMA = decoder_only("llama", "Llama")
MISTRAL = decoder_only("mistral", "Mistral", may_slide=True)
MINISTRAL3 = decoder_only("ministral3", "Ministral3", may_slide=True)
QWEN2 = decoder_only("qwen2", "Qwen2", may_slide=True)
QWEN3 = decoder_only("qwen3", "Qwen3", with_norms({**DECODER.norms, **QUERY_AND_KEY_NORMS}), may_slide=True)

GRANITE = decoder_only("granite", "Granite")
SMOLLM3 = decoder_only("smollm3", "SmolLM3", may_slide=True)

ROWS = (LLAMA, MISTRAL, MINISTRAL3, QWEN2, QWEN3, GRANITE, SMOLLM3)
