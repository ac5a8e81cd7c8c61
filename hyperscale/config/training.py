"""How long, how large and how fast to step."""

from typing import Literal

from pydantic import Field

from hyperscale.config.section import Section


class OptimizerSettings(Section):
    """AdamW over the generator, in fp32."""

    learning_rate: float = Field(default=5e-4, gt=0)
    head_learning_rate_ratio: float = Field(default=1.0, gt=0)
    """Learning rate of the weights of a hypernetwork's heads, as a multiple of `learning_rate`. AdamW moves each weight
    by about the rate, and a generated weight is a sum over `code_dim` of them: with 1 / code_dim it moves as far in a
    step as a weight of `independent` does. Without effect on generators that have no heads."""
    trunk_learning_rate_ratio: float = Field(default=1.0, gt=0)
    """Learning rate of what makes a hypernetwork's codes (task encoder, layer and position embeddings, trunk), as a
    multiple of `learning_rate`: they move the weights of all tasks and sites at once. To train new embeddings alone
    with `hyperscale adapt`, set it to 1."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    clip_norm: float | None = Field(default=1.0, gt=0)
    """Largest gradient norm over the whole generator; null = no clipping."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """After the warm-up: down to 0 at the last step, along a line or half a cosine, or unchanged."""
    warmup_steps: int = Field(default=10, ge=0)


class TrainingSettings(Section):
    """The optimizer steps of a run."""

    steps: int = Field(ge=1)
    batch_size: int = Field(default=16, ge=1)
    """Samples of one optimizer step, over all ranks and micro-batches."""
    micro_batch_size: int = Field(default=8, ge=1)
    """Samples that one rank runs at once."""
    optimizer: OptimizerSettings = OptimizerSettings()
    loss: Literal["token_mean", "square_mean", "sample_mean", "token_sum"] = "token_mean"
    """What a sample of n label tokens weighs: n (the mean over the step's label tokens), √n (square averaging, InternVL
    2.5, arXiv 2412.05271) or 1 (the mean over samples, so that long targets do not drown short ones). Or the sum over
    label tokens, as HyperFormer's code has it: its gradient grows with the step, so `clip_norm` then always acts."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of the target that is spread evenly over the vocabulary."""
    evaluate_every: int | None = Field(default=None, ge=1)
    """Also evaluate every so many steps; the end always does."""
    evaluation_batch_size: int | None = Field(default=None, ge=1)
    """Rows that one rank scores at once; null = twice `micro_batch_size`, since nothing is kept for a backward pass."""
    evaluate_untouched: bool = True
    """Score the backbone without adapters before the first step."""
    evaluate_test: bool = False
    """Score the test splits once, after the last step; no choice depends on them."""
    checkpoint_every: int = Field(default=50, ge=1)
    keep_checkpoints: int = Field(default=2, ge=1)
    max_skipped_steps: int = Field(default=5, ge=0)
    """Steps in a row that may be skipped because their loss or gradient norm is NaN or infinite; one more ends the run.
    0 = the first one ends it."""
