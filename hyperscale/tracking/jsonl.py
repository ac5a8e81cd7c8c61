"""The run's own record: every event is one line of JSON. All trackers are fed from this file.

    {"event": "step", "time": 1760000000.0, "step": 12, "loss": 0.71, "task_losses": {"sst2": 0.69}, …}

JSON cannot express NaN and infinities; they are written as null.
"""

import json
import math
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from hyperscale.config.secrets import without_credentials
from hyperscale.errors import RunFolderError
from hyperscale.logger import get_logger
from hyperscale.places import open_place
from hyperscale.tracking.metrics import Point, evaluation_metrics, points, run_metrics, step_metrics
from hyperscale.training.callbacks import CheckpointRecord, EvaluationRecord, RunFacts, RunOutcome, StepRecord

METRICS_FILE = "metrics.jsonl"

Record = RunFacts | StepRecord | EvaluationRecord | CheckpointRecord | RunOutcome

_TYPES: Mapping[str, type[Any]] = {
    "run_start": RunFacts,
    "step": StepRecord,
    "evaluation": EvaluationRecord,
    "checkpoint": CheckpointRecord,
    "run_end": RunOutcome,
}
_EVENTS = {kind: event for event, kind in _TYPES.items()}
_log = get_logger(__name__)


@dataclass(frozen=True)
class Entry:
    """One line of the file."""

    record: Record
    time: float
    """Seconds since the epoch."""
    run_key: str | None
    """Identifies the run over all its restarts; only lines of a run's start have it."""

    @property
    def step(self) -> int:
        return self.record.start_step if isinstance(self.record, RunFacts) else self.record.step


def read_entries(folder: str) -> Iterator[Entry]:
    """Yield the entries of a run folder's file in order. Skips torn lines; `FileNotFoundError` if there is no file."""
    place = open_place(folder).child(METRICS_FILE)
    with place.fs.open(place.path, "rt", encoding="utf-8") as stream:
        for line in stream:
            entry = _parse(line)
            if entry is not None:
                yield entry


def recorded_points(entries: Iterable[Entry]) -> list[Point]:
    """Return the numbers of a run's entries, one per key and step. The last recorded value counts."""
    newest: dict[tuple[str, int], Point] = {}
    for entry in entries:
        match entry.record:
            case RunFacts() as facts:
                values = run_metrics(facts)
            case StepRecord() as record:
                values = step_metrics(record)
            case EvaluationRecord() as record:
                values = evaluation_metrics(record)
            case _:
                continue
        for point in points(values, entry.step, entry.time):
            newest[point.key, point.step] = point
    return list(newest.values())


class JsonlTracker:
    """Writes `metrics.jsonl` in the run folder. A resumed run continues the file, and each step is in it once.

    Object stores cannot append. There the lines go to a local file, which is uploaded with every checkpoint.
    """

    def __init__(self, folder: str, run_key: str) -> None:
        self._target = open_place(folder).child(METRICS_FILE)
        self._run_key = run_key
        self._stream: IO[str] | None = None
        self._cleanup = ExitStack()
        self._has_failed = False

    def on_run_start(self, facts: RunFacts) -> None:
        self._run_key = facts.tracking_state.get("run_key", self._run_key)
        try:
            file = self._local_file()
            file.parent.mkdir(parents=True, exist_ok=True)
            _cut(file, facts.start_step)
            self._stream = self._cleanup.enter_context(file.open("a", encoding="utf-8"))
        except OSError as error:
            raise RunFolderError(f"{self._target} cannot be written: {error}. Choose another `output=`.") from error
        self._write(facts)

    def on_step(self, record: StepRecord) -> None:
        self._write(record)

    def on_evaluation(self, record: EvaluationRecord) -> None:
        self._write(record)

    def on_checkpoint(self, record: CheckpointRecord) -> None:
        self._write(record)
        self._upload()

    def on_run_end(self, outcome: RunOutcome) -> None:
        self._write(outcome)
        self._upload()
        self._stream = None
        self._cleanup.close()

    def state(self) -> Mapping[str, Any]:
        return {"run_key": self._run_key}

    @property
    def run_key(self) -> str:
        """What identifies the run over all its restarts."""
        return self._run_key

    def reader(self) -> "EntryReader":
        """Return a reader of the whole file, which also sees lines added later. The run must have started."""
        if self._stream is None:
            raise RunFolderError(f"{self._target} is not open: the run has not started")
        return EntryReader(Path(self._stream.name))

    def _local_file(self) -> Path:
        if self._target.is_local:
            return self._target.local_path
        scratch = Path(tempfile.mkdtemp(prefix="hyperscale-"))
        self._cleanup.callback(shutil.rmtree, scratch, ignore_errors=True)
        if self._target.exists():
            self._target.fs.get_file(self._target.path, str(scratch / METRICS_FILE))
        return scratch / METRICS_FILE

    def _write(self, record: Record) -> None:
        if self._stream is None:
            return
        try:
            if self._has_failed:
                self._stream.write("\n")  # a full disk may have left half a line
            self._stream.write(_line(record, self._run_key))
            self._stream.flush()
            self._has_failed = False
        except OSError as error:
            self._warn(error)

    def _upload(self) -> None:
        if self._target.is_local or self._stream is None:
            return
        try:
            self._target.fs.makedirs(self._target.parent.path, exist_ok=True)
            self._target.fs.put_file(self._stream.name, self._target.path)
        except OSError as error:
            self._warn(error)

    def _warn(self, error: OSError) -> None:
        if not self._has_failed:
            _log.warning("%s cannot be written (%s): training goes on without these lines", self._target, error)
        self._has_failed = True


class EntryReader:
    """Reads the file in order while it grows. It keeps the file open, so deleting the file does no harm."""

    def __init__(self, file: Path) -> None:
        self._stream = file.open("rb")

    def read(self, limit: int) -> list[Entry]:
        """Return the next entries, up to `limit`. Skips torn lines."""
        entries: list[Entry] = []
        while len(entries) < limit:
            position = self._stream.tell()
            line = self._stream.readline()
            if not line.endswith(b"\n"):
                self._stream.seek(position)
                break
            entry = _parse(line.decode("utf-8", "replace"))
            if entry is not None:
                entries.append(entry)
        return entries

    def close(self) -> None:
        self._stream.close()


def _cut(file: Path, start_step: int) -> None:
    """Drop lines past the step that the run continues from, earlier ends and torn lines. A new run drops all lines."""
    if not file.exists():
        return
    cut = file.with_suffix(".cut")
    with file.open(encoding="utf-8", errors="replace") as old, cut.open("w", encoding="utf-8") as new:
        for line in old:
            entry = _parse(line)
            is_end = entry is not None and isinstance(entry.record, RunOutcome)
            if start_step > 0 and entry is not None and entry.step <= start_step and not is_end:
                new.write(line)
    cut.replace(file)


def _line(record: Record, run_key: str) -> str:
    content: dict[str, Any] = {"event": _EVENTS[type(record)], "time": round(time.time(), 3)}
    if isinstance(record, RunFacts):
        content["run_key"] = run_key
    content |= without_credentials(_finite(asdict(record)))
    return json.dumps(content, ensure_ascii=False) + "\n"


def _parse(line: str) -> Entry | None:
    if not line.endswith("\n"):
        return None
    try:
        content = json.loads(line)
        kind = _TYPES[content.pop("event")]
        moment, run_key = content.pop("time"), content.pop("run_key", None)
        return Entry(kind(**_restored(content)), moment, run_key)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    return [_finite(entry) for entry in value] if isinstance(value, list | tuple) else value


def _restored(content: dict[str, Any]) -> dict[str, Any]:
    """Turn nulls in the place of numbers back into NaN, and the list of tasks back into a tuple."""
    numbers = ("loss", "learning_rate", "grad_norm", "step_seconds", "tokens_per_second", "seconds_left", "seconds")
    restored: dict[str, Any] = {
        key: math.nan if value is None and key in numbers else value for key, value in content.items()
    }
    if "task_losses" in restored:
        restored["task_losses"] = _numbers(restored["task_losses"])
    if "scores" in restored:
        restored["scores"] = {task: _numbers(scores) for task, scores in restored["scores"].items()}
    if "tasks" in restored:
        restored["tasks"] = tuple(restored["tasks"])
    return restored


def _numbers(values: Mapping[str, float | None]) -> dict[str, float]:
    return {key: math.nan if value is None else value for key, value in values.items()}
