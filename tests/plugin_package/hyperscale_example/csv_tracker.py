"""A tracker: it appends each step's loss to a CSV file."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from hyperscale.tracking.jsonl import Entry
from hyperscale.training.callbacks import RunFacts, RunOutcome, StepRecord
from hyperscale_example.register import CsvSettings


class CsvTracker:
    """A line `step,loss` for every step."""

    def __init__(self, settings: CsvSettings, default_root: str, tags: Mapping[str, str]) -> None:
        self._file = Path(settings.file)

    def open(self, facts: RunFacts, run_key: str, live: bool) -> None:
        if not self._file.exists():
            self._file.write_text("step,loss\n")

    def push(self, entries: Sequence[Entry], may_be_there: bool) -> int:
        there = {line.partition(",")[0] for line in self._file.read_text().splitlines()} if may_be_there else set()
        steps = [entry.record for entry in entries if isinstance(entry.record, StepRecord)]
        rows = [f"{step.step},{step.loss}\n" for step in steps if str(step.step) not in there]
        with self._file.open("a") as stream:
            stream.writelines(rows)
        return len(rows)

    def is_temporary(self, error: Exception) -> bool:
        return isinstance(error, OSError)

    def state(self) -> Mapping[str, str]:
        return {"title": "CSV", "where": str(self._file), "command": ""}

    def close(self) -> None: ...

    def record_end(self, run_key: str, outcome: RunOutcome) -> None: ...

    def record_comparison(self, name: str, metrics: Mapping[str, float], files: Sequence[Path]) -> None: ...
