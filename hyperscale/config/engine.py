"""How a step runs: DeepSpeed ZeRO-3 over the frozen backbone, or plain PyTorch."""

from typing import Literal

from pydantic import Field

from hyperscale.config.section import Section


class EngineSettings(Section):
    """`zero` shards the backbone over the workers; `local` keeps all of it in each (the reference)."""

    kind: Literal["zero", "local"] = "zero"
    ds_config: str = Field(default="zero3", min_length=1)
    """A preset of ds_configs/, or the path of a DeepSpeed JSON file, relative to the recipe."""
    resident: Literal["none", "all"] = "none"
    """Which blocks stay gathered between steps: none (least memory) or all (fastest)."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass instead of keeping its activations."""
    communication_timeout_minutes: float = Field(default=30.0, gt=0)
