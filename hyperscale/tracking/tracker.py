"""The interface of a tracker. A tracker records a run in one place, from the entries of its `metrics.jsonl`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from hyperscale.tracking.jsonl import Entry
from hyperscale.training.callbacks import RunFacts, RunOutcome


class Tracker(Protocol):
    """One place. The class is called with its settings, the folder that holds the run folder, and tags.

    All calls block and may raise. After `open` they come from one thread, which retries temporary failures. Entries
    come from the file and hold no secrets.
    """

    def open(self, facts: RunFacts, run_key: str, live: bool) -> None:
        """Find the run by its key, or create it.

        Args:
            run_key: identifies the run over all its restarts.
            live: whether the run continues in this process; False when a finished record is sent.

        Raises:
            ConfigError: the place cannot be used; says what to do.
        """
        ...

    def push(self, entries: Sequence[Entry], may_be_there: bool) -> int:
        """Record entries in the order of the run, and return how many values were sent.

        `may_be_there`: an earlier process or a failed call may have sent some of them; send only what is missing.
        """
        ...

    def is_temporary(self, error: Exception) -> bool:
        """Return whether the same call may succeed later."""
        ...

    def state(self) -> Mapping[str, str]:
        """Return what is needed to find the run again, without secrets. Checkpoints and `result.json` keep it.

        Three keys are shown to people: `title` (the tracker's name), `where`, and `command`, which opens it (or "").
        """
        ...

    def close(self) -> None:
        """Release what `open` took."""
        ...

    def record_end(self, run_key: str, outcome: RunOutcome) -> None:
        """Record the end of a run whose process was killed. Does nothing if the run has recorded its end."""
        ...

    def record_comparison(self, name: str, metrics: Mapping[str, float], files: Sequence[Path]) -> None:
        """Record a comparison of runs as a run of its own."""
        ...
