"""Task encoders by the name their settings carry."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from hyperscale.config.adaptation import AdaptationSettings, TaskEncoderSettings
from hyperscale.model.task_encoders.table import TaskTable
from hyperscale.model.task_encoders.text import TaskText, check_features

TaskEncoder = TaskTable | TaskText
"""A module that makes codes [K, `dim`] of task ids [K]."""


def _table(settings: Any, num_tasks: int, _features: Tensor | None) -> TaskEncoder:
    return TaskTable(settings, num_tasks)


def _text(settings: Any, num_tasks: int, features: Tensor | None) -> TaskEncoder:
    return TaskText(settings, check_features(features, num_tasks))


TASK_ENCODERS: Mapping[str, Callable[[Any, int, Tensor | None], TaskEncoder]] = {"table": _table, "text": _text}


def build_task_encoder(settings: TaskEncoderSettings, num_tasks: int, features: Tensor | None = None) -> TaskEncoder:
    """Make the task encoder of a recipe.

    Args:
        features: [K, D] in fp32 for `text`: one row a task, such as the mean of the backbone's last hidden states over
            its description.

    Raises:
        ConfigError: `text` without features, or with as many as there are not tasks.
    """
    return TASK_ENCODERS[settings.kind](settings, num_tasks, features)


def blank_features(settings: AdaptationSettings, num_tasks: int, width: int) -> Tensor | None:
    """Return features [K, D] that say nothing, where only their size counts and a generator asks for any."""
    return torch.zeros(num_tasks, width) if settings.reads_descriptions else None
