"""What the trainer and evaluation ask of an engine."""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hyperscale.data.collate import Batch
from hyperscale.engine.collective import Collective
from hyperscale.model.adapted import AdaptedModel


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, summed over all ranks and micro-batches; equal on every rank."""

    loss: float
    """The optimised loss: the mean over label tokens, or as `training.loss` defines it."""
    task_losses: Mapping[int, float]
    """Task index -> mean loss of its label tokens, for the tasks in this step."""
    learning_rate: float
    grad_norm: float
    """Norm of the whole generator's gradient before clipping."""
    tokens: int
    """Real tokens, no padding."""
    samples: int
    is_last: bool = False
    """Whether a rank was asked to stop, so that all ranks stop after this step."""

    @property
    def is_finite(self) -> bool:
        """Whether loss and gradient norm are finite. If not, the step changed nothing."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


class Engine(Protocol):
    """A frozen backbone that can be stepped. Every rank must call every method, in the same order."""

    @property
    def model(self) -> AdaptedModel: ...

    @property
    def collective(self) -> Collective: ...

    @property
    def device(self) -> torch.device: ...

    def train_step(self, batches: Sequence[Batch], step: int, is_last: bool = False) -> StepResult:
        """Run one optimizer step on this rank's micro-batches; `step` counts from 0.

        `is_last`: whether this rank was asked to stop. The result says whether any rank was.
        """
        ...

    def evaluating(self) -> AbstractContextManager[None]:
        """Turn dropout and gradients off inside the `with`; gathered parameters are released at its end."""
        ...

    def state(self) -> Mapping[str, Mapping[str, Tensor]]:
        """Return CPU copies of the `generator` and `optimizer` tensors; they do not depend on the number of ranks."""
        ...

    def load_state(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Restore what `state` returned."""
        ...
