"""The loop: when to step, evaluate and save. How a step runs is the engine's, who listens is the callbacks'."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hyperscale.config.training import TrainingSettings
from hyperscale.data.loader import TrainLoader
from hyperscale.engine.base import Engine, StepResult
from hyperscale.train.callbacks import Callback, StepRecord
from hyperscale.train.throughput import Throughput


@dataclass(frozen=True)
class Trainer:
    """Runs a recipe's steps; every rank runs the same loop."""

    engine: Engine
    loader: TrainLoader
    settings: TrainingSettings
    task_names: Sequence[str]
    callbacks: Sequence[Callback]
    """Empty on all ranks but 0."""
    evaluate: Callable[[int], None]
    """Called on every rank with the number of steps done."""
    save: Callable[[int], None]
    """Called on every rank with the number of steps done."""

    def run(self, start_step: int) -> None:
        """Step from `start_step` (steps already done) to the end; evaluates and saves at the end in any case."""
        throughput = Throughput()
        for step in range(start_step, self.settings.steps):
            batches = self.loader.next_step()
            throughput.start_step()
            result = self.engine.train_step(batches, step)
            seconds = throughput.end_step(result.tokens)
            done = step + 1
            record = self._record(done, result, seconds, throughput)
            for callback in self.callbacks:
                callback.on_step(record)
            last = done == self.settings.steps
            if last or _due(done, self.settings.evaluate_every):
                self.evaluate(done)
            if last or _due(done, self.settings.checkpoint_every):
                self.save(done)

    def _record(self, done: int, result: StepResult, seconds: float, throughput: Throughput) -> StepRecord:
        return StepRecord(
            step=done,
            total_steps=self.settings.steps,
            loss=result.loss,
            task_losses={self.task_names[task]: loss for task, loss in result.task_losses.items()},
            learning_rate=result.learning_rate,
            grad_norm=result.grad_norm,
            tokens=result.tokens,
            samples=result.samples,
            step_seconds=seconds,
            tokens_per_second=throughput.tokens_per_second,
            seconds_left=throughput.seconds_for(self.settings.steps - done),
        )


def _due(done: int, every: int | None) -> bool:
    return every is not None and done % every == 0
