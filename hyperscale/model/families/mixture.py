"""Mixtures of experts: attention can be adapted; experts and routers are frozen."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from hyperscale.model.families.llama import DECODER, QUERY_AND_KEY_NORMS, decoder_only
from hyperscale.model.families.table import Experts, Stack

_ATTENTION = ("q", "k", "v", "o")


def _decoder(total: str, norms: Mapping[str, str] = DECODER.norms, dense_layers: bool = False) -> Stack:
    """Return LLaMA's decoder with experts; `dense_layers`: some blocks have LLaMA's feed-forward network instead."""
    dense = {path for name, path in DECODER.projections.items() if name not in _ATTENTION}
    return replace(
        DECODER,
        projections={name: DECODER.projections[name] for name in _ATTENTION},
        sublayers={"attention": DECODER.sublayers["attention"]},
        norms=norms,
        untouched=frozenset(dense if dense_layers else ()),
        experts=Experts("mlp.experts", total),
    )


def _by_expert(experts: str, gate: str, up: str, down: str) -> Mapping[str, Sequence[str]]:
    """Return how checkpoints name the three matrices of an expert, which transformers joins into two parameters.

    `experts`: path of the experts in the files, from the block.
    """
    each = rf"\1.{experts}.{{expert}}"
    return {
        r"(.*)\.mlp\.experts\.gate_up_proj": (f"{each}.{gate}.weight", f"{each}.{up}.weight"),
        r"(.*)\.mlp\.experts\.down_proj": (f"{each}.{down}.weight",),
    }


QWEN3_MOE = replace(
    decoder_only(
        "qwen3_moe",
        "Qwen3Moe",
        _decoder("num_experts", {**DECODER.norms, **QUERY_AND_KEY_NORMS}, dense_layers=True),
        may_slide=True,
    ),
    stored=_by_expert("mlp.experts", "gate_proj", "up_proj", "down_proj"),
)
MIXTRAL = replace(
    decoder_only("mixtral", "Mixtral", _decoder("num_local_experts"), may_slide=True),
    stored={
        **_by_expert("block_sparse_moe.experts", "w1", "w3", "w2"),
        r"(.*)\.mlp\.gate\.weight": (r"\1.block_sparse_moe.gate.weight",),
    },
)
GPT_OSS = decoder_only("gpt_oss", "GptOss", _decoder("num_local_experts"), may_slide=True)

ROWS = (QWEN3_MOE, MIXTRAL, GPT_OSS)
