"""The loop: when to step, evaluate and save. The engine runs a step, and callbacks listen."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hyperscale.config.training import TrainingSettings
from hyperscale.data.loader import TrainLoader
from hyperscale.engine.base import Engine, StepResult
from hyperscale.errors import EngineError
from hyperscale.logger import get_logger
from hyperscale.training.callbacks import Callback, StepRecord
from hyperscale.training.throughput import Throughput

_logger = get_logger(__name__)


class StopTraining(Exception):  # noqa: N818 - not an error: it ends the loop on all ranks alike
    """The run was asked to stop. What it had is saved."""


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
    """Whether this step has already been evaluated, in this run or in the run that it continues."""
    save: Callable[[int], None]
    """Called on every rank with the number of steps done. A second call for a step writes no weights again."""
    is_asked_to_stop: Callable[[], bool] = lambda: False
    """Whether this rank was asked to stop; the ranks decide together in the next step."""

    def run(self, start_step: int) -> None:
        """Step from `start_step` (steps already done) to the end; evaluates and saves at the end in any case.

        A step that is due for both is saved before it is scored, because scoring may take longer than the steps: a run
        that is killed meanwhile repeats no step. `save` then adds the scores.
        While steps are skipped, only the last step is saved: the update before them may have ruined the generator, and
        a new checkpoint would remove one from before it.

        A request to stop ends the loop after the step that is running, or after the batch of the evaluation. The
        step is saved; what an evaluation had is not, and a continued run evaluates again.

        Raises:
            StopTraining: the run was asked to stop.
            EngineError: more than `max_skipped_steps` steps in a row had a loss or gradient norm that is not finite.
        """
        if start_step and self._is_due(start_step, self.settings.evaluate_every) and not self.is_scored(start_step):
            self.evaluate(start_step)
            self.save(start_step)
        throughput, skips = Throughput(), _Skips(self.settings.max_skipped_steps, start_step)
        for step in range(start_step, self.settings.steps):
            batches = self.loader.next_step()
            throughput.start_step()
            result = self.engine.train_step(batches, step, self.is_asked_to_stop())
            seconds = throughput.end_step(result.tokens)
            done = step + 1
            skips.count(done, result, [self.task_names[task] for task in result.task_losses])
            record = self._record(done, result, seconds, throughput, skips.total)
            for callback in self.callbacks:
                callback.on_step(record)
            skips.check()
            saves = self._is_due(done, self.settings.checkpoint_every) and (
                not skips.in_a_row or done == self.settings.steps
            )
            if result.is_last:
                if not skips.in_a_row:
                    self.save(done)
                raise StopTraining
            if saves:
                self.save(done)
                skips.saved_step = done
            if self._is_due(done, self.settings.evaluate_every):
                self._evaluate(done, skips)
                if saves:
                    self.save(done)

    def _evaluate(self, done: int, skips: "_Skips") -> None:
        try:
            self.evaluate(done)
        except StopTraining:
            if not skips.in_a_row:
                self.save(done)
            raise

    def _record(
        self, done: int, result: StepResult, seconds: float, throughput: Throughput, skipped_steps: int
    ) -> StepRecord:
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
            skipped_steps=skipped_steps,
        )

    def _is_due(self, done: int, every: int | None) -> bool:
        return done == self.settings.steps or (every is not None and done % every == 0)


@dataclass
class _Skips:
    """The steps whose update was left out because the loss or the gradient norm was not finite."""

    limit: int
    """Largest number of skipped steps in a row."""
    saved_step: int
    """The step of the newest checkpoint; 0 if there is none."""
    total: int = 0
    in_a_row: int = 0
    last: str = ""

    def count(self, done: int, result: StepResult, tasks: Sequence[str]) -> None:
        """Record one step; `done` counts from 1."""
        if result.is_finite:
            self.in_a_row = 0
            return
        self.total += 1
        self.in_a_row += 1
        self.last = (
            f"step {done} (loss {result.loss:g}, gradient norm {result.grad_norm:g}, tasks {', '.join(sorted(tasks))})"
        )
        _logger.warning("skipped the update of %s", self.last)

    def check(self) -> None:
        """Raise `EngineError` after more than `limit` skipped steps in a row."""
        if self.in_a_row <= self.limit:
            return
        lower = "training.optimizer.learning_rate=…"
        advice = (
            f"Continue from step {self.saved_step} with a lower learning rate: --resume {lower}. If it diverges again "
            "at once, delete the newest checkpoint first"
            if self.saved_step
            else f"There is no checkpoint yet: start again with a lower learning rate, {lower}"
        )
        steps = "1 step" if self.in_a_row == 1 else f"{self.in_a_row} steps in a row"
        raise EngineError(
            f"Training has diverged: the loss or the gradient norm was not finite in {steps} "
            f"(training.max_skipped_steps={self.limit}). Last was {self.last}. {advice}."
        )
