"""OLMo from its second generation on: norms after every sub-layer instead of before it."""

from hyperscale.model.families.llama import QUERY_AND_KEY_NORMS, decoder_only, with_norms

_DECODER = with_norms(
    {
        "attention_output": "post_attention_layernorm",
        "feed_forward_output": "post_feedforward_layernorm",
        **QUERY_AND_KEY_NORMS,
    }
)

OLMO2 = decoder_only("olmo2", "Olmo2", _DECODER)
OLMO3 = decoder_only("olmo3", "Olmo3", _DECODER, may_slide=True)

ROWS = (OLMO2, OLMO3)
