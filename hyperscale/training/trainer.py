"""The loop: when to step, evaluate and save. How a step runs is the engine's, who listens is the callbacks'."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hyperscale.config.training import TrainingSettings
from hyperscale.data.loader import TrainLoader
from hyperscale.engine.base import Engine, StepResult
from hyperscale.training.callbacks import Callback, StepRecord
from hyperscale.training.throughput import Throughput


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
    is_scored: Callable[[int], bool]
    """Whether `evaluate` has been through this number of steps, now or in the run that this one continues."""
    save: Callable[[int], None]
    """Called on every rank with the number of steps done."""

    def run(self, start_step: int) -> None:
        """Step from `start_step` (steps already done) to the end; evaluates and saves at the end in any case.

        What is due for both is saved before it is scored too: scoring may take longer than the steps, and a run that
        is killed meanwhile would have to take them again.
        """
        if start_step and self._is_due(start_step, self.settings.evaluate_every) and not self.is_scored(start_step):
            self.evaluate(start_step)
            self.save(start_step)
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
            saves = self._is_due(done, self.settings.checkpoint_every)
            if saves:
                self.save(done)
            if self._is_due(done, self.settings.evaluate_every):
                self.evaluate(done)
                if saves:
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

    def _is_due(self, done: int, every: int | None) -> bool:
        return done == self.settings.steps or (every is not None and done % every == 0)
