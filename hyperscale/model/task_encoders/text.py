"""Task codes from the tasks' written descriptions, so that an untrained task has a code too."""

import torch
from torch import Tensor, nn

from hyperscale.config.adaptation import TaskTextSettings
from hyperscale.errors import ConfigError


class TaskText(nn.Module):
    """A trained projection of fixed features, one row per task (as in Text-to-LoRA, arXiv 2506.06105).

    Features are pooled hidden states of the descriptions. Those of different texts point in nearly the same direction,
    so their mean is subtracted. Codes then start as far apart as those of a table, near N(0, 1). The features, their
    mean and their spread are part of the generator's state, so a checkpoint computes codes without the backbone.
    """

    rows = "features"
    """Name of the tensor with a row for each task."""
    features: Tensor
    centre: Tensor
    spread: Tensor

    def __init__(self, settings: TaskTextSettings, features: Tensor) -> None:
        """`features`: [K, D] in fp32, one row for each task of the run, in order."""
        super().__init__()
        self.dim = settings.dim
        centre = features.mean(0)
        self.register_buffer("features", features.clone())
        self.register_buffer("centre", centre)
        self.register_buffer("spread", (features - centre).pow(2).mean().sqrt().clamp(min=1e-6))
        self.project = nn.Linear(features.shape[1], settings.dim)
        nn.init.normal_(self.project.weight, std=features.shape[1] ** -0.5)
        nn.init.zeros_(self.project.bias)

    def forward(self, task_index: Tensor) -> Tensor:
        """Return codes [K, E] of task ids [K] int64."""
        codes: Tensor = self.project((self.features.index_select(0, task_index) - self.centre) / self.spread)
        return codes

    def append(self, features: Tensor) -> Tensor:
        """Add untrained tasks by their features [N, D]; return their task ids [N].

        The centre and spread of the trained tasks stay, so their codes do not change.
        """
        first = len(self.features)
        self.features = torch.cat([self.features, features.to(self.features)])
        return torch.arange(first, len(self.features), device=self.features.device)


def check_features(features: Tensor | None, num_tasks: int) -> Tensor:
    """Return the features; raise ConfigError if there are none, or not one row per task."""
    if features is None:
        raise ConfigError(
            "adaptation.task_encoder.kind 'text' needs features of the tasks' descriptions, and there are none; "
            "use 'table'"
        )
    if features.dim() != 2 or len(features) != num_tasks:
        raise ConfigError(
            f"adaptation.task_encoder.kind 'text' has features of shape {list(features.shape)} for {num_tasks} tasks"
        )
    return features
