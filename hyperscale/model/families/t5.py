"""T5: encoder-decoders with relative position biases."""

from hyperscale.model.families.table import Architecture, Stack


def _stack(name: str, feed_forward: int, cross: bool) -> Stack:
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


def _encoder_decoder(model_type: str, stem: str, mask_argument: str) -> Architecture:
    return Architecture(
        model_type=model_type,
        model_class=f"{stem}ForConditionalGeneration",
        is_encoder_decoder=True,
        stacks=(_stack("encoder", feed_forward=1, cross=False), _stack("decoder", feed_forward=2, cross=True)),
        block_class=f"{stem}Block",
        mask_argument=mask_argument,
        may_untie_head=True,
    )


T5 = _encoder_decoder("t5", "T5", mask_argument="mask")
MT5 = _encoder_decoder("mt5", "MT5", mask_argument="mask")
UMT5 = _encoder_decoder("umt5", "UMT5", mask_argument="attention_mask")

ROWS = (T5, MT5, UMT5)
