"""How a step runs: DeepSpeed ZeRO-3 over the frozen backbone, or plain PyTorch."""

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from hyperscale.config.section import Section
from hyperscale.config.sizes import parse_size

RESIDENT_WORDS = ("auto", "none", "all")


class EngineSettings(Section):
    """`zero` shards the backbone over the workers; `local` keeps all of it in each (the reference)."""

    kind: Literal["zero", "local"] = "zero"
    ds_config: str = Field(default="zero3", min_length=1)
    """A preset of ds_configs/, or the path of a DeepSpeed JSON file, relative to the recipe."""
    resident: str = "auto"
    """How much of the backbone stays gathered on every worker, besides its own shard. `auto`: what the plan of the
    run (`hyperscale plan`) leaves free; `none`: nothing between uses (least memory); `all`: everything (fastest);
    or an amount of memory such as `500MiB` or `2GiB`, filled block by block."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass instead of keeping its activations."""
    offload_checkpoints: bool = False
    """Keep what the blocks are recomputed from in host memory: of GPUs, with `activation_checkpointing`."""
    generated_budget: str = "4GiB"
    """The most that the generated weights of a step may take, with gradients and copies, on a rank whose blocks are
    recomputed anyway. Above it every site of a hypernetwork makes its own inside its block, twice a pass."""
    communication_timeout_minutes: float = Field(default=30.0, gt=0)

    @field_validator("resident", "generated_budget")
    @classmethod
    def _is_word_or_size(cls, value: str, info: ValidationInfo) -> str:
        words = RESIDENT_WORDS if info.field_name == "resident" else ()
        if value not in words:
            try:
                parse_size(value)
            except ValueError as error:
                allowed = f"one of {', '.join(words)}, or an" if words else "an"
                raise ValueError(
                    f"'{value}' is not allowed: must be {allowed} amount of memory such as 500MiB or 2GiB"
                ) from error
        return value
