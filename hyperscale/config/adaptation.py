"""What is trained: adapter kinds at the backbone's sites, and the generator that makes their weights."""

from typing import Annotated, Literal

from pydantic import Field

from hyperscale.config.section import Section


class LoraSettings(Section):
    """Low-rank update of linear projections, `y + (alpha / rank) · B(A x)` (arXiv 2106.09685)."""

    kind: Literal["lora"] = "lora"
    rank: int = Field(default=8, ge=1)
    alpha: float = Field(default=8.0, gt=0)
    targets: tuple[str, ...] = Field(default=("q", "v"), min_length=1)
    """Projections by their short names. LLaMA: q, k, v, o, gate, up, down.
    T5: q, k, v, o, cross_q, cross_k, cross_v, cross_o, wi or (gated) wi_0 and wi_1, wo."""


class BottleneckSettings(Section):
    """Bottleneck adapter on a sub-layer's output, `y + U act(D y + b_d) + b_u` (arXiv 1902.00751, section 2.1)."""

    kind: Literal["bottleneck"] = "bottleneck"
    reduction: int = Field(default=32, ge=1)
    """Bottleneck width = model width // reduction."""
    activation: Literal["gelu", "gelu_new", "relu", "silu"] = "gelu_new"
    targets: tuple[Literal["attention", "feed_forward"], ...] = Field(
        default=("attention", "feed_forward"), min_length=1
    )


AdapterSettings = Annotated[LoraSettings | BottleneckSettings, Field(discriminator="kind")]


class TaskTableSettings(Section):
    """One learned vector a task."""

    kind: Literal["table"] = "table"
    dim: int = Field(default=64, ge=1)


class HypernetworkSettings(Section):
    """One network for all layers and positions of a stack (HyperFormer++, arXiv 2106.04489).

    It is conditioned on task, layer and position.
    """

    kind: Literal["hypernetwork"] = "hypernetwork"
    layer_dim: int = Field(default=64, ge=1)
    position_dim: int = Field(default=64, ge=1)
    hidden_dim: int = Field(default=128, ge=1)
    code_dim: int = Field(default=64, ge=1)
    stacks: Literal["separate", "joint"] = "separate"
    """`separate`: one network for the encoder and one for the decoder, as published; `joint`: one for both."""


class IndependentSettings(Section):
    """Every task owns its adapter weights and shares nothing (Houlsby et al.)."""

    kind: Literal["independent"] = "independent"


class SharedSettings(Section):
    """All tasks use one set of adapter weights."""

    kind: Literal["shared"] = "shared"


GeneratorSettings = Annotated[HypernetworkSettings | IndependentSettings | SharedSettings, Field(discriminator="kind")]


class AdaptationSettings(Section):
    """Generator, task encoder and adapter kinds; comparing methods is changing `generator.kind`."""

    generator: GeneratorSettings = HypernetworkSettings()
    task_encoder: TaskTableSettings = TaskTableSettings()
    adapters: tuple[AdapterSettings, ...] = Field(default=(LoraSettings(),), min_length=1)
