"""The context that a launcher gives to a worker, and the result that a run returns to its launcher."""

import json
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hyperscale.errors import HyperscaleError
from hyperscale.places import open_place
from hyperscale.run.stopping import StopRequest
from hyperscale.tracking.jsonl import read_entries
from hyperscale.tracking.provenance import git_commit
from hyperscale.tracking.trackers import places_of_old_result

RESULT = "result.json"


@dataclass(frozen=True)
class RunIdentity:
    """The identity of a run, which survives restarts of its workers. The process of the command creates it once."""

    key: str
    """Identifies the run in every tracker, even before its first checkpoint."""
    commit: str | None
    """The git commit of the working directory."""

    @staticmethod
    def new(name: str) -> "RunIdentity":
        """Create the identity of a new run."""
        return RunIdentity(f"{name}-{uuid.uuid4().hex[:12]}", git_commit(Path.cwd()))

    @staticmethod
    def of(name: str, folder: str) -> "RunIdentity":
        """Return the identity of the run that was started in a folder, or a new one."""
        try:
            keys = [entry.run_key for entry in read_entries(folder) if entry.run_key]
        except OSError:
            keys = []
        return RunIdentity(keys[-1], git_commit(Path.cwd())) if keys else RunIdentity.new(name)


@dataclass(frozen=True)
class WorkerContext:
    """One worker of a run. If `world_size` is more than 1, torch.distributed is initialised."""

    rank: int
    world_size: int
    local_rank: int
    """Number of this worker on its node, and of its GPU."""
    launcher: str
    """`ray`, `torchrun` or `local`."""
    progress: Callable[[dict[str, Any]], None]
    """Receives progress events on rank 0; never blocks."""
    run: RunIdentity
    stop: StopRequest = field(default_factory=StopRequest)


@dataclass(frozen=True)
class RunResult:
    """The result of a finished run. The launcher shows it; `result.json` in the run folder stores it."""

    name: str
    folder: str
    steps: int
    seconds: float
    evaluations: tuple[Mapping[str, Any], ...]
    """`EvaluationRecord`s as plain values, in order: untouched, majority, and those of the run."""
    bundles: Mapping[str, str] = field(default_factory=dict)
    checkpoint: str = ""
    trackers: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """tracker -> the keys that identify the run there; `title`, `where` and `command` are for people."""
    trained_parameters: int = 0
    total_parameters: int = 0


def ignore(_event: dict[str, Any]) -> None:
    """Drop the progress events of ranks that nobody watches."""


def user_error(kind: str, message: str, is_transient: bool = False) -> HyperscaleError:
    """Recreate an error that a worker raised in another process; `kind` is the name of its class."""
    kinds = {error.__name__: error for error in HyperscaleError.__subclasses__()}
    return kinds.get(kind, HyperscaleError)(message, is_transient=is_transient)


def write_result(result: RunResult) -> None:
    """Write `result.json` into the run folder, local or remote."""
    place = open_place(result.folder).child(RESULT)
    place.fs.pipe_file(place.path, (json.dumps(asdict(result), indent=2) + "\n").encode())


def read_result(folder: str) -> RunResult:
    """Read a finished run's result.

    Raises:
        HyperscaleError: the run has not finished.
    """
    place = open_place(folder).child(RESULT)
    try:
        values = json.loads(place.fs.cat_file(place.path))
    except FileNotFoundError as error:
        raise HyperscaleError(f"{folder} contains no finished run: there is no {RESULT}") from error
    if "mlflow" in values:
        values["trackers"] = places_of_old_result(values.pop("mlflow"))
    return RunResult(**{**values, "evaluations": tuple(values["evaluations"])})
