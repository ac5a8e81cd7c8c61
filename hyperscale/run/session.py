"""One run on one rank: its position in the data, its scores, its checkpoints and its listeners."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from hyperscale.checkpoint.layout import RECIPE
from hyperscale.checkpoint.store import Checkpoint, CheckpointStore
from hyperscale.config.loading import dump_recipe, render_recipe, shareable_recipe
from hyperscale.config.run import Recipe
from hyperscale.config.secrets import without_credentials
from hyperscale.data.corpus import Corpus
from hyperscale.data.loader import Share, TrainLoader
from hyperscale.engine.base import Engine
from hyperscale.errors import RunStopped
from hyperscale.model.generators.generator import num_parameters
from hyperscale.model.quantized.blocks import num_weights
from hyperscale.places import open_place
from hyperscale.run.context import RunResult, WorkerContext, write_result
from hyperscale.run.predictions import write_predictions
from hyperscale.terminal.progress import ProgressSender
from hyperscale.tracking.trackers import tracked_places
from hyperscale.training.callbacks import Callback, CheckpointRecord, EvaluationRecord, RunFacts, RunOutcome, StepRecord
from hyperscale.training.evaluation import TEST, UNTOUCHED, VALIDATION, Evaluator, majority_record
from hyperscale.training.trainer import StopTraining, Trainer


@dataclass(frozen=True)
class Session:
    """The built parts of a run on one rank."""

    recipe: Recipe
    context: WorkerContext
    corpus: Corpus
    engine: Engine
    sender: ProgressSender
    store: CheckpointStore
    manifest: dict[str, Any]

    @property
    def is_first(self) -> bool:
        return self.context.rank == 0

    def evaluator(self) -> Evaluator:
        training = self.recipe.training
        size = training.evaluation_batch_size or 2 * training.micro_batch_size
        return Evaluator(self.engine, self.corpus, size, self.sender.phase, self._check_stop)

    def is_asked_to_stop(self) -> bool:
        """Return whether this rank was asked to stop; rank 0 also looks into the run folder."""
        stop = self.context.stop
        if self.is_first and stop.can_save:
            stop.look_into(self.recipe.output)
        return stop.reason is not None

    def _check_stop(self) -> None:
        if self.engine.collective.anyone(self.is_asked_to_stop()):
            raise StopTraining


class LastStep:
    """Records the newest step, so that a failed run can report how far it came."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_run_start(self, facts: RunFacts) -> None: ...

    def on_step(self, record: StepRecord) -> None:
        self.step = record.step

    def on_evaluation(self, record: EvaluationRecord) -> None: ...

    def on_checkpoint(self, record: CheckpointRecord) -> None: ...

    def on_run_end(self, outcome: RunOutcome) -> None: ...

    def state(self) -> Mapping[str, Any]:
        return {}


class TrainingRun:
    """The state of one run outside the engine: its evaluations, its position in the data, its listeners."""

    def __init__(
        self,
        session: Session,
        checkpoint: Checkpoint | None,
        callbacks: Sequence[Callback],
        origins: Sequence[Mapping[str, Any] | None] = (),
    ) -> None:
        self.session = session
        self.start_step = checkpoint.step if checkpoint else 0
        state = checkpoint.state if checkpoint else {}
        self.tracking_state: dict[str, Any] = dict(state.get("tracking", {}))
        self.origins = list(state.get("origins", origins))
        self.evaluations = [EvaluationRecord(**record) for record in state.get("evaluations", [])]
        self.loader = _train_loader(session)
        if checkpoint:
            self.loader.load_state(state["loader"])
        self.evaluator = session.evaluator()
        self._saved: dict[int, str] = {}
        """The newest step that this process has saved, and the path of its checkpoint."""
        self._last_step = LastStep(self.start_step)
        self.callbacks: Sequence[Callback] = (self._last_step, *callbacks) if callbacks else ()

    @property
    def last_step(self) -> int:
        """The newest complete step; known on rank 0."""
        return self._last_step.step

    def train(self) -> None:
        """Score the untouched backbone once, run the remaining steps, and score the test splits if enabled.

        Raises:
            RunStopped: the run was asked to stop; the same message on every rank.
        """
        stop = self.session.context.stop
        stop.can_save = True
        try:
            self._train()
        except StopTraining:
            raise self._stopped() from None
        finally:
            stop.can_save = False

    def _stopped(self) -> RunStopped:
        collective, store = self.session.engine.collective, self.session.store
        stop = self.session.context.stop
        stop.reason = next(filter(None, collective.gather(stop.reason)))
        step, newest = collective.from_first((self.last_step, store.latest() if self.session.is_first else None))
        kept = f"{newest} is saved: continue with --resume" if newest else "nothing was trained yet"
        return RunStopped(f"stopped by {stop.reason} after step {step}; {kept}")

    def _train(self) -> None:
        recipe = self.session.recipe
        if self.session.is_first:
            place = open_place(recipe.output).child(RECIPE)
            place.fs.pipe_file(place.path, render_recipe(shareable_recipe(recipe)).encode())
        if not self.evaluations:
            self._record(majority_record(self.session.corpus))
            if recipe.training.evaluate_untouched:
                self._evaluate(0, UNTOUCHED)
        trainer = Trainer(
            engine=self.session.engine,
            loader=self.loader,
            settings=recipe.training,
            task_names=self.session.corpus.names,
            callbacks=self.callbacks,
            evaluate=lambda step: self._evaluate(step, VALIDATION),
            is_asked_to_stop=self.session.is_asked_to_stop,
            is_scored=lambda step: any((r.step, r.stage) == (step, VALIDATION) for r in self.evaluations),
            save=self.save,
        )
        trainer.run(self.start_step)
        if recipe.training.evaluate_test:
            self._evaluate(recipe.training.steps, TEST)

    def facts(self) -> RunFacts:
        recipe, engine = self.session.recipe, self.session.engine
        trained = num_parameters(engine.model.generator)
        return RunFacts(
            name=recipe.name,
            folder=recipe.output,
            recipe=dump_recipe(recipe),
            tasks=self.session.corpus.names,
            datasets=self.session.corpus.describe(),
            world_size=self.session.context.world_size,
            trained_parameters=trained,
            total_parameters=trained + _backbone_parameters(engine),
            start_step=self.start_step,
            total_steps=recipe.training.steps,
            tracking_state=self.tracking_state,
        )

    def save(self, step: int) -> None:
        """Commit a checkpoint on rank 0. The other ranks wait, so that none continues before the checkpoint is safe.

        A step that this process has saved already gets only a new state.
        """
        if self.session.is_first:
            state = {
                "loader": self.loader.state(),
                "seed": self.session.recipe.seed,
                "tasks": [loaded.task.model_dump(mode="json") for loaded in self.session.corpus.tasks],
                "origins": self.origins,
                "evaluations": [asdict(record) for record in self.evaluations],
                "tracking": self._merged_tracking_state(),
            }
            path = self._saved.get(step)
            if path is None:
                recipe = shareable_recipe(self.session.recipe)
                checkpoint = Checkpoint(step, self.session.engine.state(), state, self.session.manifest, recipe)
                path = self.session.store.save(checkpoint)
            else:
                path = self.session.store.update_state(path, state)
            self._saved = {step: path}
            for callback in self.callbacks:
                callback.on_checkpoint(CheckpointRecord(step, path))
        self.session.engine.collective.barrier()

    def result(self, seconds: float, bundles: dict[str, str]) -> RunResult:
        facts = self.facts()
        result = RunResult(
            name=facts.name,
            folder=facts.folder,
            steps=facts.total_steps,
            seconds=seconds,
            evaluations=tuple(asdict(record) for record in self.evaluations),
            bundles=bundles,
            checkpoint=self.session.store.latest() or "",
            trackers=tracked_places(self._merged_tracking_state()),
            trained_parameters=facts.trained_parameters,
            total_parameters=facts.total_parameters,
        )
        write_result(result)
        return result

    def _evaluate(self, step: int, stage: str) -> None:
        evaluation = self.evaluator(step, stage)
        if self.session.is_first:
            write_predictions(self.session.recipe.output, self.session.corpus, stage, evaluation.answers)
        self._record(evaluation.record)

    def _record(self, record: EvaluationRecord) -> None:
        self.evaluations.append(record)
        for callback in self.callbacks:
            callback.on_evaluation(record)

    def _merged_tracking_state(self) -> dict[str, Any]:
        merged = dict(self.tracking_state)
        for callback in self.callbacks:
            merged.update(callback.state())
        return merged


@contextmanager
def notifying_listeners(run: TrainingRun) -> Iterator[list[RunOutcome]]:
    """Notify the listeners of the run's start and of its end, even if it fails."""
    start = time.monotonic()
    outcome: list[RunOutcome] = []
    started: list[Callback] = []
    try:
        for callback in run.callbacks:
            started.append(callback)  # first, because a callback whose start fails may already hold resources
            callback.on_run_start(run.facts())
        yield outcome
    except BaseException as error:
        status = "stopped" if isinstance(error, KeyboardInterrupt | RunStopped) else "failed"
        message = str(without_credentials(str(error)))
        outcome = [RunOutcome(status, run.last_step, time.monotonic() - start, message=message[:500])]
        raise
    finally:
        for callback in started:
            callback.on_run_end(outcome[0])


def _train_loader(session: Session) -> TrainLoader:
    recipe, context, corpus = session.recipe, session.context, session.corpus
    return TrainLoader(
        [loaded.train.encoded for loaded in corpus.tasks],
        recipe.data,
        recipe.training.batch_size,
        recipe.training.micro_batch_size,
        recipe.seed,
        Share(context.rank, context.world_size, corpus.layout),
    )


def _backbone_parameters(engine: Engine) -> int:
    return num_weights(engine.model.backbone)
