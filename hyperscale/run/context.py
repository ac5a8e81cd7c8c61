"""What a launcher tells a worker about its place, and what a run tells its launcher at the end."""

import json
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hyperscale.errors import HyperscaleError
from hyperscale.places import open_place
from hyperscale.tracking.jsonl import read_entries
from hyperscale.tracking.provenance import git_commit
from hyperscale.tracking.trackers import places_of_old_result

RESULT = "result.json"


@dataclass(frozen=True)
class RunIdentity:
    """What stays the same over all restarts of a run's workers; made once, where the command was given."""

    key: str
    """Finds the run again in every tracker, even where no checkpoint had been written yet."""
    commit: str | None
    """The git commit of the working directory."""

    @staticmethod
    def new(name: str) -> "RunIdentity":
        """Make the identity of a run that starts now."""
        return RunIdentity(f"{name}-{uuid.uuid4().hex[:12]}", git_commit(Path.cwd()))

    @staticmethod
    def of(name: str, folder: str) -> "RunIdentity":
        """Return the identity of the run that has begun in a folder, or a new one."""
        try:
            keys = [entry.run_key for entry in read_entries(folder) if entry.run_key]
        except OSError:
            keys = []
        return RunIdentity(keys[-1], git_commit(Path.cwd())) if keys else RunIdentity.new(name)


@dataclass(frozen=True)
class WorkerContext:
    """One worker of a run. torch.distributed is up already where `world_size` is more than 1."""

    rank: int
    world_size: int
    local_rank: int
    """Number of this worker on its node; the number of its GPU."""
    launcher: str
    """`ray`, `torchrun` or `local`."""
    progress: Callable[[dict[str, Any]], None]
    """Takes progress events on rank 0; never blocks."""
    run: RunIdentity


@dataclass(frozen=True)
class RunResult:
    """What the launcher shows when a run has ended; also `result.json` in the run folder."""

    name: str
    folder: str
    steps: int
    seconds: float
    evaluations: tuple[Mapping[str, Any], ...]
    """`EvaluationRecord`s as plain values: untouched, majority, and the run's own, in order."""
    bundles: Mapping[str, str] = field(default_factory=dict)
    checkpoint: str = ""
    trackers: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """tracker -> what finds the run there; `title`, `where` and `command` are for people."""
    trained_parameters: int = 0
    total_parameters: int = 0


def ignore(_event: dict[str, Any]) -> None:
    """Drop the progress events of ranks that nobody watches."""


def user_error(kind: str, message: str, is_transient: bool = False) -> HyperscaleError:
    """Return the error that a worker raised in another process, by its class's name."""
    kinds = {found.__name__: found for found in HyperscaleError.__subclasses__()}
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
        raise HyperscaleError(f"{folder} holds no finished run: there is no {RESULT}") from error
    if "mlflow" in values:
        values["trackers"] = places_of_old_result(values.pop("mlflow"))
    return RunResult(**{**values, "evaluations": tuple(values["evaluations"])})
