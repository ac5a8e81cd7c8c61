"""One optimizer step over a frozen backbone: generate once, run the micro-batches, reduce once, update."""

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hyperscale.config.training import TrainingSettings
from hyperscale.data.collate import Batch
from hyperscale.engine.base import StepResult
from hyperscale.engine.collective import Collective
from hyperscale.engine.optimizer import GeneratorOptimizer
from hyperscale.model.adapted import AdaptedModel, label_positions, token_losses

_BUCKET_NUMEL = 32 * 1024 * 1024
"""Elements of one gradient all-reduce: 128 MiB of fp32, beyond which larger messages gain nothing."""

_EXPONENTS = {"token_mean": 1.0, "square_mean": 0.5, "sample_mean": 0.0, "token_sum": 1.0}
"""A sample of n label tokens weighs n to this power in the loss."""


@dataclass(frozen=True)
class TrainingStep:
    """One step, the same on any engine and any number of ranks.

    The loss is normalised over the whole optimizer step: each rank sums its token losses, the one all-reduce that
    carries the gradients carries the sums and counts too, and the division comes after it. So a step is the same on
    any number of ranks.
    """

    model: AdaptedModel
    optimizer: GeneratorOptimizer
    collective: Collective
    device: torch.device
    settings: TrainingSettings
    num_tasks: int
    seed: int

    def run(self, batches: Sequence[Batch], step: int, is_last: bool = False) -> StepResult:
        """Run this rank's micro-batches and update the generator; every rank must call this.

        A step whose loss or gradient norm is NaN or infinite changes nothing. Both are sums over all ranks, so that
        every rank decides alike. `is_last` is summed with them.
        """
        tasks = torch.unique(torch.cat([batch.task_index for batch in batches]))
        generation = self.model.generation(tasks.to(self.device))
        totals = _Totals.zeros(self.num_tasks, self.device)
        totals.counts[-1] = is_last
        for number, batch in enumerate(batches):
            torch.manual_seed(_mixed_seed(self.seed, step, number, self.collective.rank))
            slots = torch.searchsorted(tasks, batch.task_index).to(self.device)
            self._run_batch(batch, self.model.training(generation, slots, len(tasks)), totals)
        generation.backward()
        self._reduce(totals)
        grad_norm = self.optimizer.clip()
        result = totals.result(self.settings.loss, self.optimizer.learning_rate(step), grad_norm)
        if result.is_finite:
            self.optimizer.step(step)
        else:
            self.optimizer.clear()
        return result

    def _run_batch(self, batch: Batch, adapted: AbstractContextManager[None], totals: "_Totals") -> None:
        """Leave one micro-batch's gradients where it takes its weights from, and add its losses to `totals`."""
        positions, targets, samples = label_positions(batch.labels, self.model.architecture.is_encoder_decoder)
        sizes = torch.bincount(samples, minlength=len(batch.labels))[samples].float()
        weights = sizes ** (_EXPONENTS[self.settings.loss] - 1)
        token_tasks = batch.task_index[samples].to(self.device)
        with adapted:
            logits = self.model.label_logits(
                batch.input_ids.to(self.device),
                batch.attention_mask.to(self.device),
                batch.labels.to(self.device),
                positions.to(self.device),
            )
            losses = token_losses(logits, targets.to(self.device), self.settings.label_smoothing)
            objective = (losses * weights.to(self.device)).sum()
            objective.backward()
        totals.add(objective.detach(), weights.sum().item(), losses.detach(), token_tasks, batch)

    def _reduce(self, totals: "_Totals") -> None:
        """Sum gradients and totals over ranks, then divide the gradients; nothing here waits for a GPU."""
        parameters = [parameter for parameter in self.model.generator.parameters() if parameter.requires_grad]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        self.collective.sum(totals.counts)
        for bucket in _buckets([totals.flat, *gradients]):
            flat = torch.cat([tensor.flatten() for tensor in bucket])
            self.collective.sum(flat)
            for tensor, reduced in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
                tensor.copy_(reduced.view_as(tensor))
        if self.settings.loss != "token_sum":
            for gradient in gradients:
                gradient.div_(totals.weight)


@dataclass(frozen=True)
class _Totals:
    """Sums of a step: losses and weights in fp32, which travel with the gradients, and counts in fp64.

    fp32 counts exactly only up to 2^24, and a sum of ones stays there.
    """

    flat: Tensor
    """Losses per task; then the weight and the objective of them all."""
    counts: Tensor
    """Label tokens per task; then samples, tokens, and the ranks that were asked to stop."""
    num_tasks: int

    @staticmethod
    def zeros(num_tasks: int, device: torch.device) -> "_Totals":
        return _Totals(
            torch.zeros(num_tasks + 2, device=device),
            torch.zeros(num_tasks + 3, dtype=torch.float64, device=device),
            num_tasks,
        )

    @property
    def weight(self) -> Tensor:
        """The sum of all label tokens' weights in the objective."""
        return self.flat[-2]

    def add(self, objective: Tensor, weight: float, losses: Tensor, token_tasks: Tensor, batch: Batch) -> None:
        self.flat[: self.num_tasks].index_add_(0, token_tasks, losses)
        self.flat[-2] += weight
        self.flat[-1] += objective
        ones = torch.ones_like(losses, dtype=self.counts.dtype)
        self.counts[: self.num_tasks].index_add_(0, token_tasks, ones)
        self.counts[-3] += len(batch.task_index)
        self.counts[-2] += batch.num_tokens

    def result(self, loss: str, learning_rate: float, grad_norm: Tensor) -> StepResult:
        """Read everything at once: the only place of a step where the host waits for a GPU."""
        values = torch.cat([self.flat.double(), self.counts, grad_norm.double().view(1)]).tolist()
        *sums, weight, objective = values[: self.num_tasks + 2]
        *counts, samples, tokens, stopping, norm = values[self.num_tasks + 2 :]
        normaliser = 1.0 if loss == "token_sum" else weight
        return StepResult(
            loss=objective / normaliser if normaliser else math.nan,  # a step without label tokens has no mean
            task_losses={task: sums[task] / counts[task] for task in range(self.num_tasks) if counts[task]},
            learning_rate=learning_rate,
            grad_norm=norm,
            tokens=int(tokens),
            samples=int(samples),
            is_last=stopping > 0,
        )


@contextmanager
def evaluation_mode(backbone: nn.Module) -> Iterator[None]:
    """Turn dropout and gradients off inside the `with`."""
    was_training = backbone.training
    backbone.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        backbone.train(was_training)


def _buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Group tensors, in order, into buckets of at most `_BUCKET_NUMEL` elements (a larger tensor is one of its own)."""
    buckets: list[list[Tensor]] = []
    size = _BUCKET_NUMEL
    for tensor in tensors:
        if size + tensor.numel() > _BUCKET_NUMEL:
            buckets.append([])
            size = 0
        buckets[-1].append(tensor)
        size += tensor.numel()
    return buckets


def _mixed_seed(*parts: int) -> int:
    """Return 63 well-mixed bits of (seed, step, micro-batch, rank): dropout needs no stored random state to resume."""
    digest = hashlib.sha256(",".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
