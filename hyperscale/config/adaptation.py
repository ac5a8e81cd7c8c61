"""What is trained: adapter kinds at the backbone's sites, and the generator that makes their weights."""

import math
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from hyperscale.config.open_union import OpenUnion
from hyperscale.config.plugins import Registry
from hyperscale.config.section import Section


def _listed(targets: Any) -> Any:
    return (targets,) if isinstance(targets, str) else targets


_Names = Annotated[tuple[str, ...], Field(min_length=1)]
Projections = Annotated[_Names, BeforeValidator(_listed, json_schema_input_type=str | _Names)]
"""Short names of projections in the family's table, or the one word `all` for every projection that a block has.

Embeddings, the head, routers and experts are not in the table."""


class AdapterSection(Section):
    """The base of every adapter kind's settings."""

    has_peft_form: ClassVar[bool] = False
    """Whether the kind alone can be exported as a PEFT folder."""


class GeneratorSection(Section):
    """The base of every generator's settings."""

    reads_task_codes: ClassVar[bool] = False
    """Whether it makes weights from the codes of the task encoder."""
    tells_tasks_apart: ClassVar[bool] = True
    """Whether tasks get weights of their own."""
    shares_parameters: ClassVar[bool] = True
    """Whether a trained parameter acts on several tasks. It decides the default of `norm_delta`'s `per_task`."""
    generates_by_site: ClassVar[bool] = False
    """Whether making each site's weights where it acts saves memory."""


class LoraSettings(AdapterSection):
    """Low-rank update of linear projections, `y + (alpha / rank) · B(A x)` (arXiv 2106.09685)."""

    has_peft_form = True
    kind: Literal["lora"] = "lora"
    rank: int = Field(default=8, ge=1)
    alpha: float = Field(default=8.0, gt=0)
    rslora: bool = False
    """Divides alpha by √rank instead of by rank (arXiv 2312.03732), so that a larger rank needs no larger rate."""
    targets: Projections = ("all",)
    """`all`: every linear projection of every block. Or short names. LLaMA: q, k, v, o, gate, up, down.
    T5: q, k, v, o, cross_q, cross_k, cross_v, cross_o, wi or (gated) wi_0 and wi_1, wo.
    `hyperscale models` lists those of every family."""

    @property
    def scale(self) -> float:
        """The factor of B A x."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class VeraSettings(AdapterSection):
    """LoRA between two frozen random matrices that all sites share, `y + b ⊙ B(d ⊙ A x)` (arXiv 2310.11454).

    A site has two vectors of its own, so a task takes little: rank + the width of the output.
    """

    has_peft_form = True
    kind: Literal["vera"] = "vera"
    rank: int = Field(default=256, ge=1)
    d_initial: float = Field(default=0.1, gt=0)
    """The value of every entry of d at the start; b starts at 0."""
    projection_seed: int = Field(default=0, ge=0, lt=2**32)
    """The seed of A and B, which no checkpoint stores."""
    targets: Projections = ("all",)
    """Projections by their short names, or `all`, as for LoRA."""


class BottleneckSettings(AdapterSection):
    """Bottleneck adapter on a sub-layer's output, `y + U act(D y + b_d) + b_u` (arXiv 1902.00751, section 2.1)."""

    kind: Literal["bottleneck"] = "bottleneck"
    reduction: int = Field(default=32, ge=1)
    """Bottleneck width = model width // reduction."""
    activation: Literal["gelu", "gelu_new", "relu", "silu"] = "gelu_new"
    layer_norm: bool = False
    """Adds a layer norm after the adapter, `y + γ ⊙ LN(U act(D y + b_d) + b_u) + β`. The generator makes γ and β too:
    this is HyperFormer's conditional layer norm (arXiv 2106.04489)."""
    targets: tuple[Literal["attention", "feed_forward"], ...] = Field(
        default=("attention", "feed_forward"), min_length=1
    )


class Ia3Settings(AdapterSection):
    """Learned scales, `(1 + δ) ⊙ y` (arXiv 2205.05638)."""

    has_peft_form = True
    kind: Literal["ia3"] = "ia3"
    targets: Projections = ("k", "v", "feed_forward")
    """Projections by their short names, or `all`, as for LoRA; their outputs are scaled. `feed_forward` scales the
    input of the feed-forward's last projection."""


class NormDeltaSettings(AdapterSection):
    """Trains all layer norms of the backbone, as differences of their weights: `w + δ`."""

    kind: Literal["norm_delta"] = "norm_delta"
    per_task: bool | None = None
    """true: every task has its own δ (Houlsby et al.). false: all tasks share one (HyperFormer). null: every task has
    its own if the generator is `independent`; otherwise they share one. δ is trained directly, not generated."""


class PrefixSettings(AdapterSection):
    """Keys and values before those of the text, in every self-attention (arXiv 2101.00190)."""

    has_peft_form = True
    kind: Literal["prefix"] = "prefix"
    length: int = Field(default=16, ge=1)
    """How many positions the prefix takes. The text follows it."""


ADAPTER_SETTINGS: Registry[type[AdapterSection]] = Registry(
    "adapter kind",
    "hyperscale.adapter_kinds",
    {
        "lora": LoraSettings,
        "vera": VeraSettings,
        "bottleneck": BottleneckSettings,
        "ia3": Ia3Settings,
        "norm_delta": NormDeltaSettings,
        "prefix": PrefixSettings,
    },
)
AdapterSettings = Annotated[
    LoraSettings | VeraSettings | BottleneckSettings | Ia3Settings | NormDeltaSettings | PrefixSettings,
    Field(discriminator="kind"),
    OpenUnion(ADAPTER_SETTINGS),
]


class TaskTableSettings(Section):
    """One learned vector for each task."""

    kind: Literal["table"] = "table"
    dim: int = Field(default=64, ge=1)


class TaskTextSettings(Section):
    """A projection of features of each task's description."""

    kind: Literal["text"] = "text"
    dim: int = Field(default=64, ge=1)


TaskEncoderSettings = Annotated[TaskTableSettings | TaskTextSettings, Field(discriminator="kind")]


class HypernetworkSettings(GeneratorSection):
    """One network for all layers and positions of a stack (HyperFormer++, arXiv 2106.04489).

    It is conditioned on task, layer and position.
    """

    reads_task_codes = True
    generates_by_site = True
    kind: Literal["hypernetwork"] = "hypernetwork"
    layer_dim: int = Field(default=64, ge=1)
    position_dim: int = Field(default=64, ge=1)
    hidden_dim: int = Field(default=128, ge=1)
    code_dim: int = Field(default=64, ge=1)
    stacks: Literal["separate", "joint"] = "separate"
    """`separate`: one network for the encoder and one for the decoder, as published. `joint`: one for both."""
    heads: Literal["shape", "position"] = "shape"
    """`shape`: tensors of the same name and shape share a head, as published. `position`: every position (`q`, `v`,
    `feed_forward`, …) has its own heads."""
    biases: Literal["head", "site"] = "head"
    """`head`: a head adds the same bias at every site, as published. `site`: every site has its own biases. They are
    an adapter that all tasks share, and the network generates what each task adds to it."""


class PerLayerSettings(GeneratorSection):
    """A hypernetwork for every layer and position, shared by the tasks (HyperFormer, arXiv 2106.04489)."""

    reads_task_codes = True
    kind: Literal["per_layer"] = "per_layer"
    hidden_dim: int = Field(default=128, ge=1)
    code_dim: int = Field(default=64, ge=1)


class IndependentSettings(GeneratorSection):
    """Every task owns its adapter weights and shares nothing (Houlsby et al.)."""

    shares_parameters = False
    kind: Literal["independent"] = "independent"


class SharedSettings(GeneratorSection):
    """All tasks use one set of adapter weights."""

    tells_tasks_apart = False
    kind: Literal["shared"] = "shared"


GENERATOR_SETTINGS: Registry[type[GeneratorSection]] = Registry(
    "generator",
    "hyperscale.generators",
    {
        "hypernetwork": HypernetworkSettings,
        "per_layer": PerLayerSettings,
        "independent": IndependentSettings,
        "shared": SharedSettings,
    },
)
GeneratorSettings = Annotated[
    HypernetworkSettings | PerLayerSettings | IndependentSettings | SharedSettings,
    Field(discriminator="kind"),
    OpenUnion(GENERATOR_SETTINGS),
]


class AdaptationSettings(Section):
    """Generator, task encoder and adapter kinds. To compare methods, change `generator.kind`."""

    generator: GeneratorSettings = HypernetworkSettings()
    task_encoder: TaskEncoderSettings = TaskTableSettings()
    adapters: tuple[AdapterSettings, ...] = Field(default=(LoraSettings(),), min_length=1)
    init: Literal["zero", "paper"] = "zero"
    """`zero`: the adapted model equals the backbone at step 0, except with a prefix. `paper`: each method starts as its
    authors published (docs/methods.md)."""

    @property
    def reads_descriptions(self) -> bool:
        """Whether task codes are made from the tasks' written descriptions."""
        return self.task_encoder.kind == "text" and self.generator.reads_task_codes

    @property
    def has_peft_form(self) -> bool:
        """Whether the adapters are of one kind, and PEFT has that kind."""
        return len({adapter.kind for adapter in self.adapters}) == 1 and self.adapters[0].has_peft_form
