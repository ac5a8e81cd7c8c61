"""The frozen model: which one, and in which precision it is held."""

from typing import Literal

from pydantic import Field

from hyperscale.config.section import Section

Quantization = Literal["none", "int8", "nf4", "nf4_all", "int4"]


class BackboneSettings(Section):
    """A Hugging Face model of a known family (docs/backbones.md): a packaged name, a local folder, or a hub id."""

    name: str = Field(min_length=1)
    """`smollm2-135m-instruct` (packaged), a folder (relative to the recipe) or a hub id (`google/t5-v1_1-base`)."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """The dtype in which the frozen weights are stored and multiplied. The generator is always fp32."""
    quantization: Quantization = "none"
    """How the blocks' linear layers are stored, sharded and gathered. `int8`: 8-bit integers with one scale an output.
    `nf4`: 4.13 bits a weight, the numbers of bitsandbytes' NF4 with double quantization. `nf4_all`: the embedding and
    the head too. `int4`: as `nf4`, but with evenly spaced numbers. Products are in `dtype`, and so is all the rest."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Dropout inside the backbone while training (T5 was trained with 0.1, LLaMA with none)."""
    attention: Literal["auto", "eager", "sdpa"] = "auto"
    """`auto`: PyTorch's fused kernel on CUDA. On CPUs, where that kernel's backward pass is slow for short texts, plain
    products that do not copy shared keys and values. `eager`: transformers' own plain products. `sdpa`: the fused
    kernel everywhere."""
