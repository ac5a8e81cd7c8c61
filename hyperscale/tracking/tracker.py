"""What a tracker is: a place that a run is recorded in, fed with the entries of its `metrics.jsonl`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from hyperscale.tracking.jsonl import Entry
from hyperscale.training.callbacks import RunFacts, RunOutcome


class Tracker(Protocol):
    """One place. Its class is called with its settings, the folder that holds the run folder, and tags.

    All calls block and may raise. After `open` they come from one thread, which tries again what is temporary. Entries
    hold no secrets: they were read from the file.
    """

    def open(self, facts: RunFacts, run_key: str, live: bool) -> None:
        """Find the run by its key, or create it.

        Args:
            run_key: what identifies the run over all its restarts.
            live: whether the run goes on in this process; False when a finished record is sent.

        Raises:
            ConfigError: the place cannot be used; says what to do.
        """
        ...

    def push(self, entries: Sequence[Entry], may_be_there: bool) -> int:
        """Record entries in the order of the run, and return how many values were sent.

        `may_be_there`: some were sent before, by an earlier process or in a call that failed; send what is missing.
        """
        ...

    def is_temporary(self, error: Exception) -> bool:
        """Return whether the same call may succeed later."""
        ...

    def state(self) -> Mapping[str, str]:
        """Return what finds the run again, without secrets; kept in checkpoints and in `result.json`.

        Three keys are shown to people: `title` (the tracker's name), `where`, and `command`, which opens it (or "").
        """
        ...

    def close(self) -> None:
        """Release what `open` took."""
        ...

    def record_end(self, run_key: str, outcome: RunOutcome) -> None:
        """Record how a run ended whose own process was killed; does nothing if it has recorded its end."""
        ...

    def record_comparison(self, name: str, metrics: Mapping[str, float], files: Sequence[Path]) -> None:
        """Record a comparison of runs as a run of its own."""
        ...
