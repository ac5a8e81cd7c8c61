"""Gemma: norms before and after every sub-layer, multiplying by `1 + w`."""

from hyperscale.model.families.llama import QUERY_AND_KEY_NORMS, decoder_only, with_norms

_NORMS = {
    "attention": "input_layernorm",
    "attention_output": "post_attention_layernorm",
    "feed_forward": "pre_feedforward_layernorm",
    "feed_forward_output": "post_feedforward_layernorm",
}

GEMMA2 = decoder_only("gemma2", "Gemma2", with_norms(_NORMS), may_slide=True)
GEMMA3_TEXT = decoder_only("gemma3_text", "Gemma3", with_norms({**_NORMS, **QUERY_AND_KEY_NORMS}), may_slide=True)

ROWS = (GEMMA2, GEMMA3_TEXT)
