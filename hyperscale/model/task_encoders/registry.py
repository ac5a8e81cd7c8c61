"""Task encoders by the `kind` of their settings."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from hyperscale.config.adaptation import AdaptationSettings, TaskEncoderSettings
from hyperscale.model.task_encoders.table import TaskTable
from hyperscale.model.task_encoders.text import TaskText, check_features

TaskEncoder = TaskTable | TaskText
"""A module that maps task ids [K] to codes [K, `dim`]."""


def _table(settings: Any, num_tasks: int, _features: Tensor | None) -> TaskEncoder:
    return TaskTable(settings, num_tasks)


def _text(settings: Any, num_tasks: int, features: Tensor | None) -> TaskEncoder:
    return TaskText(settings, check_features(features, num_tasks))


TASK_ENCODERS: Mapping[str, Callable[[Any, int, Tensor | None], TaskEncoder]] = {"table": _table, "text": _text}


def build_task_encoder(settings: TaskEncoderSettings, num_tasks: int, features: Tensor | None = None) -> TaskEncoder:
    """Build the task encoder of a recipe.

    Args:
        features: [K, D] in fp32 for `text`: one row per task, such as the mean of the backbone's last hidden states
            over its description.

    Raises:
        ConfigError: `text` has no features, or their number is not the number of tasks.
    """
    return TASK_ENCODERS[settings.kind](settings, num_tasks, features)


def blank_features(settings: AdaptationSettings, num_tasks: int, width: int) -> Tensor | None:
    """Return features [K, D] of zeros if the generator needs features and only their size matters, else None."""
    return torch.zeros(num_tasks, width) if settings.reads_descriptions else None
