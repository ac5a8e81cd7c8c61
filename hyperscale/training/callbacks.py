"""What the trainer reports to its listeners: progress, trackers, the JSONL record.

The trainer and the engine know no vendor; a tracker is a `Callback`. Callbacks run on rank 0 alone, between steps:
they must never raise because of their own failures, and must not wait for a network.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class RunFacts:
    """What is known before the first step."""

    name: str
    folder: str
    recipe: Mapping[str, Any]
    """The resolved recipe, as plain JSON values."""
    tasks: tuple[str, ...]
    datasets: Mapping[str, Mapping[str, Any]]
    """Per task: `source`, `digest`, `train`, `validation` (rows)."""
    world_size: int
    trained_parameters: int
    total_parameters: int
    """Backbone and generator together."""
    start_step: int
    """0, or the step of the checkpoint that the run continues from."""
    total_steps: int
    tracking_state: Mapping[str, Any]
    """What trackers left in the checkpoint (where the run is); empty at first."""


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step, over all ranks."""

    step: int
    """1 after the first step."""
    total_steps: int
    loss: float
    task_losses: Mapping[str, float]
    """Mean label-token loss of the tasks that were in this step."""
    learning_rate: float
    grad_norm: float
    tokens: int
    """Real tokens (no padding) of the step, all ranks."""
    samples: int
    step_seconds: float
    tokens_per_second: float
    seconds_left: float
    skipped_steps: int = 0
    """Steps so far whose update was left out because the loss or the gradient norm was not finite; this one included.
    A resumed run counts from 0."""


@dataclass(frozen=True)
class EvaluationRecord:
    """Scores of all tasks at one moment."""

    step: int
    stage: str
    """`untouched` (no adapters), `majority` (the most common label), `validation` (the run's own) or `test`."""
    scores: Mapping[str, Mapping[str, float]]
    """task -> metric -> value in percent; the first metric of a task is its main one."""
    samples: Mapping[str, int]
    seconds: float


@dataclass(frozen=True)
class CheckpointRecord:
    """A whole checkpoint that has been committed."""

    step: int
    path: str


@dataclass(frozen=True)
class RunOutcome:
    """How the run ended."""

    status: str
    """`finished`, `failed` or `stopped`."""
    step: int
    seconds: float
    message: str = ""
    bundles: Mapping[str, str] | None = None
    """task -> folder of its exported bundle."""


class Callback(Protocol):
    """One listener. All methods are called on rank 0 only, in the order of the run."""

    def on_run_start(self, facts: RunFacts) -> None: ...

    def on_step(self, record: StepRecord) -> None: ...

    def on_evaluation(self, record: EvaluationRecord) -> None: ...

    def on_checkpoint(self, record: CheckpointRecord) -> None: ...

    def on_run_end(self, outcome: RunOutcome) -> None: ...

    def state(self) -> Mapping[str, Any]:
        """Return what the next checkpoint must keep to continue (where a tracker has the run), or an empty mapping."""
        ...
