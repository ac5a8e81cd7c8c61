"""Which tasks a run trains on, how they are mixed, and how long their texts may be."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from hyperscale.config.section import Section


class MixtureSettings(Section):
    """How often each task is drawn: rate_i = min(n_i · scale, maximum)^(1/temperature), as in seqio."""

    temperature: float = Field(default=1.0, gt=0)
    """1 = in proportion to the number of rows; the larger, the more even."""
    maximum: float | None = Field(default=None, gt=0)
    """Rows beyond which a task counts as no larger; null = no limit."""
    scale: float = Field(default=1.0, gt=0)
    weights: tuple[Annotated[float, Field(ge=0)], ...] | None = None
    """Rates of your own, one for each of `data.tasks` in their order, 0 = never drawn; the rule above is then not used.
    """


class DataSettings(Section):
    """Tasks, mixture, limits of length and of rows."""

    tasks: tuple[str, ...] = Field(min_length=1)
    """Names of packaged tasks or of files in `task_folders`, or paths of task files. Their order is the task index."""
    task_folders: tuple[str, ...] = ()
    max_source_tokens: int = Field(default=256, ge=1)
    max_target_tokens: int = Field(default=64, ge=1)
    mixture: MixtureSettings = MixtureSettings()
    train_limit: int | None = Field(default=None, ge=1)
    """Largest number of training rows of each task; the rows are chosen by hash, not from the file's start."""
    validation_limit: int | None = Field(default=None, ge=1)
    test_limit: int | None = Field(default=None, ge=1)
    mixed_tasks: bool = True
    """false: every optimizer step holds rows of one task, the same on all ranks, as HyperFormer was trained."""
    bucket_steps: int = Field(default=1, ge=1)
    """Optimizer steps whose rows are drawn together and sorted by length. More saves padding, but tasks of unlike
    length then fall into unlike steps; 1 leaves every step a fair draw and sorts among its micro-batches only."""
    too_long: Literal["drop", "error", "truncate_source"] = "drop"
    """What happens to a row beyond the token limits. A target is never cut: `truncate_source` drops the row then."""

    @model_validator(mode="after")
    def _tasks_fit(self) -> Self:
        repeated = sorted({task for task in self.tasks if self.tasks.count(task) > 1})
        if repeated:
            raise ValueError(f"tasks lists {', '.join(repeated)} more than once")
        weights = self.mixture.weights
        if weights is not None and len(weights) != len(self.tasks):
            raise ValueError(
                f"mixture.weights has {len(weights)} values for {len(self.tasks)} tasks; give one for each"
            )
        if weights is not None and not any(weights):
            raise ValueError("mixture.weights are all 0, so no task would ever be drawn")
        return self
