"""Starting from an earlier run, with tasks that are new to it."""

from typing import Literal

from pydantic import Field

from hyperscale.config.section import Section


class StartSettings(Section):
    """A checkpoint to begin from. Its tasks are the first of `data.tasks`; `hyperscale adapt` fills this in."""

    checkpoint: str = Field(min_length=1)
    """A checkpoint's folder, or a run folder for its newest one."""
    known_tasks: int = Field(ge=1)
    """How many tasks it was trained for."""
    train: Literal["new_tasks", "everything"] = "new_tasks"
    """`new_tasks`: only what belongs to the new tasks alone (their embeddings, or their own adapters), everything else
    stays bit for bit; `everything`: the whole generator keeps training."""
