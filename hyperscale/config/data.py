"""The tasks of a run, how they are mixed, and how long their texts may be."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from hyperscale.config.section import Section


class MixtureSettings(Section):
    """How often each task with n_i rows is drawn: rate_i = min(n_i · scale, maximum)^(1/temperature), as in seqio."""

    temperature: float = Field(default=1.0, gt=0)
    """1 = in proportion to the number of rows; a larger value draws tasks more evenly."""
    maximum: float | None = Field(default=None, gt=0)
    """Largest number of rows that a task counts for; null = no limit."""
    scale: float = Field(default=1.0, gt=0)
    weights: tuple[Annotated[float, Field(ge=0)], ...] | None = None
    """Your own rates, one for each of `data.tasks` in their order, instead of the rule above; 0 = never drawn."""


class DataSettings(Section):
    """Tasks, their mixture, and the limits of token and row counts."""

    tasks: tuple[str, ...] = Field(min_length=1)
    """Names of packaged tasks or of files in `task_folders`, or paths of task files, in the order of their indices."""
    task_folders: tuple[str, ...] = ()
    max_source_tokens: int = Field(default=256, ge=1)
    max_target_tokens: int = Field(default=64, ge=1)
    mixture: MixtureSettings = MixtureSettings()
    train_limit: int | None = Field(default=None, ge=1)
    """Largest number of training rows of each task. A hash chooses the rows; they are not the first of the file."""
    validation_limit: int | None = Field(default=None, ge=1)
    test_limit: int | None = Field(default=None, ge=1)
    mixed_tasks: bool = True
    """false: every optimizer step holds rows of one task, the same on all ranks, as HyperFormer was trained."""
    bucket_steps: int = Field(default=1, ge=1)
    """Number of optimizer steps whose rows are drawn together and sorted by length. A larger number saves padding, but
    tasks of different lengths then fall into different steps. With 1 every step is a fair draw, and rows are sorted
    only among its micro-batches."""
    too_long: Literal["drop", "error", "truncate_source"] = "drop"
    """What happens to a row that exceeds a token limit. A target is never cut: if the target is too long,
    `truncate_source` drops the row. It takes tokens out of the middle of a prompt; a conversation first loses its
    oldest exchanges."""
    cache_folder: str | None = None
    """Folder of the encoded rows on each machine; by default `HYPERSCALE_DATA_CACHE`, else `encoded` in the folder
    `HYPERSCALE_CACHE`."""

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
