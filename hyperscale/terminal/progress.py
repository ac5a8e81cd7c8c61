"""The events that a run sends to the driver's terminal, and the state after each event.

Events are plain JSON values, so that rank 0 can send them from any node through an actor, a queue or a file.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from hyperscale.logger import get_logger
from hyperscale.tracking.metrics import main_score
from hyperscale.training.callbacks import CheckpointRecord, EvaluationRecord, RunFacts, RunOutcome, StepRecord

_SMOOTHING = 0.8
_log = get_logger(__name__)


class ProgressSender:
    """Turns the run's callbacks into events for `sink`, at most one step every `min_seconds`.

    `sink` must return at once (start a remote call, put into a queue without waiting). A failure is logged once.
    """

    def __init__(self, sink: Callable[[dict[str, Any]], None], min_seconds: float = 0.2) -> None:
        self._sink = sink
        self._min_seconds = min_seconds
        self._last: dict[str, float] = {}
        self._has_failed = False

    def phase(self, text: str, done: int | None = None, total: int | None = None) -> None:
        """Send the current phase, such as `loading the backbone`; `done` of `total` items if it counts them."""
        if done is None or done in (0, total) or self._is_due("phase"):
            self._send("phase", {"text": text, "done": done, "total": total})

    def on_run_start(self, facts: RunFacts) -> None:
        about = asdict(facts)
        kept = ("name", "world_size", "trained_parameters", "total_parameters", "start_step", "total_steps")
        self._send("start", {"tasks": list(facts.tasks)} | {key: about[key] for key in kept})

    def on_step(self, record: StepRecord) -> None:
        if record.step == record.total_steps or self._is_due("step"):
            self._send("step", asdict(record))

    def on_evaluation(self, record: EvaluationRecord) -> None:
        self._send("evaluation", asdict(record))

    def on_checkpoint(self, record: CheckpointRecord) -> None:
        self._send("checkpoint", asdict(record))

    def on_run_end(self, outcome: RunOutcome) -> None:
        self._send("end", asdict(outcome))

    def state(self) -> Mapping[str, Any]:
        return {}

    def _is_due(self, kind: str) -> bool:
        now = time.monotonic()
        if now - self._last.get(kind, -self._min_seconds) < self._min_seconds:
            return False
        self._last[kind] = now
        return True

    def _send(self, kind: str, content: dict[str, Any]) -> None:
        try:
            self._sink({"event": kind, **content})
        except Exception as error:  # noqa: BLE001 - a lost terminal must not end a run
            if not self._has_failed:
                _log.warning("The progress display cannot be reached (%s); the run goes on", error)
            self._has_failed = True


@dataclass(frozen=True)
class Progress:
    """Everything that a display shows. `advance` returns the next state."""

    name: str = ""
    tasks: tuple[str, ...] = ()
    world_size: int = 1
    trained_parameters: int = 0
    total_parameters: int = 0
    start_step: int = 0
    total_steps: int = 0
    step: int = 0
    loss: float | None = None
    """Smoothed, as are the tasks' losses: a mixed batch holds few samples of each task."""
    task_losses: Mapping[str, float] = field(default_factory=dict)
    learning_rate: float = 0.0
    step_seconds: float = 0.0
    tokens_per_second: float = 0.0
    seconds_left: float | None = None
    scores: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    """stage -> task -> main score of its newest evaluation, in percent."""
    evaluated_step: int | None = None
    checkpoint_step: int | None = None
    phase: str = "starting"
    phase_count: str = ""
    outcome: str | None = None


def advance(progress: Progress, event: Mapping[str, Any]) -> Progress:
    """Return the state after an event. Events of unknown kinds change nothing."""
    content = {key: value for key, value in event.items() if key != "event"}
    match event["event"]:
        case "start":
            tasks = tuple(content.pop("tasks"))
            return replace(progress, **content, tasks=tasks, step=content["start_step"], outcome=None)
        case "phase":
            count = "" if not content["done"] else f"{content['done']}/{content['total']}"
            return replace(progress, phase=content["text"], phase_count=count)
        case "step":
            return _after_step(progress, content)
        case "evaluation":
            scores = {task: main_score(values) for task, values in content["scores"].items()}
            return replace(
                progress, scores={**progress.scores, content["stage"]: scores}, evaluated_step=content["step"]
            )
        case "checkpoint":
            return replace(progress, checkpoint_step=content["step"])
        case "end":
            message = f": {content['message']}" if content["message"] else ""
            return replace(progress, phase="", seconds_left=None, outcome=content["status"] + message)
    return progress


def _after_step(progress: Progress, record: Mapping[str, Any]) -> Progress:
    losses = {task: _smooth(progress.task_losses.get(task), loss) for task, loss in record["task_losses"].items()}
    return replace(
        progress,
        step=record["step"],
        total_steps=record["total_steps"],
        loss=_smooth(progress.loss, record["loss"]),
        task_losses={**progress.task_losses, **losses},
        learning_rate=record["learning_rate"],
        step_seconds=record["step_seconds"],
        tokens_per_second=_smooth(progress.tokens_per_second or None, record["tokens_per_second"]),
        seconds_left=record["seconds_left"],
        phase="training",
        phase_count="",
    )


def _smooth(before: float | None, now: float) -> float:
    # A NaN shows at once and does not stay: before != before is true for NaN alone.
    return now if before is None or before != before else _SMOOTHING * before + (1 - _SMOOTHING) * now
