"""The reference engine: plain PyTorch, the whole backbone in every process, no sharding.

With several ranks it is ordinary data parallelism, since the generator's gradients are all that is exchanged.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from hyperscale.data.collate import Batch
from hyperscale.engine.base import StepResult
from hyperscale.engine.collective import Collective
from hyperscale.engine.state import load_tensors, state_tensors
from hyperscale.engine.step import TrainingStep, evaluation_mode
from hyperscale.model.adapted import AdaptedModel


@dataclass(frozen=True)
class LocalEngine:
    """Runs `TrainingStep` on an unsharded backbone."""

    step: TrainingStep

    @property
    def model(self) -> AdaptedModel:
        return self.step.model

    @property
    def collective(self) -> Collective:
        return self.step.collective

    @property
    def device(self) -> torch.device:
        return self.step.device

    def train_step(self, batches: Sequence[Batch], step: int, is_last: bool = False) -> StepResult:
        return self.step.run(batches, step, is_last)

    def evaluating(self) -> AbstractContextManager[None]:
        return evaluation_mode(self.model.backbone)

    def state(self) -> Mapping[str, Mapping[str, Tensor]]:
        return state_tensors(self.step)

    def load_state(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        load_tensors(self.step, tensors)
