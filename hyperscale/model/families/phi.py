"""Phi 3 and 4: one projection makes queries, keys and values, another one gate and inner activations."""

from dataclasses import replace

from hyperscale.model.families.llama import DECODER, decoder_only
from hyperscale.model.families.table import FUSED_QKV

_DECODER = replace(
    DECODER,
    projections={
        FUSED_QKV: "self_attn.qkv_proj",
        "o": DECODER.projections["o"],
        "gate_up": "mlp.gate_up_proj",
        "down": DECODER.projections["down"],
    },
)

PHI3 = decoder_only("phi3", "Phi3", _DECODER, may_slide=True)

ROWS = (PHI3,)
