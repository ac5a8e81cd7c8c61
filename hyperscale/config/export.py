"""What a run exports."""

from typing import Literal

from hyperscale.config.section import Section


class ExportSettings(Section):
    """One bundle per task, written when training ends."""

    enabled: bool = True
    format: Literal["auto", "peft", "native"] = "auto"
    """`peft`: the folder that PEFT loads, and vLLM if it is LoRA. It holds only lora, only vera, only ia3, or only
    prefix (on decoder-only families without sliding windows). `native`: our own format, for every kind. `auto`:
    `peft` where it can hold the adapters, else `native`."""
    dtype: Literal["float32", "bfloat16"] = "float32"
