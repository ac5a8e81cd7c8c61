"""Feeds a tracker from `metrics.jsonl` in the background, so that no server delays a training step."""

import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from hyperscale.config.secrets import without_credentials
from hyperscale.logger import get_logger
from hyperscale.tracking.jsonl import Entry, EntryReader, JsonlTracker
from hyperscale.tracking.tracker import Tracker
from hyperscale.training.callbacks import CheckpointRecord, EvaluationRecord, RunFacts, RunOutcome, StepRecord

_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 30.0
_BATCH = 200
_log = get_logger(__name__)


class Pusher:
    """A listener of the run that sends the entries of the file to one tracker. It must come after `journal`.

    Opening the tracker may raise. After that nothing raises, and no training step waits. A temporary failure is
    retried until the run has ended; a record that the tracker rejects is skipped.

    Args:
        patience: seconds that the end of the run waits for a tracker that does not answer.
        limit: seconds that the end of the run waits for a tracker that answers.
    """

    def __init__(
        self, name: str, tracker: Tracker, journal: JsonlTracker, patience: float = 10.0, limit: float = 300.0
    ) -> None:
        self._name = name
        self._tracker = tracker
        self._journal = journal
        self._patience = patience
        self._limit = limit
        self._changed = threading.Condition()
        self._has_news = False
        self._closing = False
        self._give_up_at = float("inf")
        self._is_failing = False
        self._has_warned = False
        self._num_skipped = 0
        self._is_done = False
        self._is_open = False
        self._folder = ""
        self._thread: threading.Thread | None = None

    def on_run_start(self, facts: RunFacts) -> None:
        """Open the tracker, and start to send what it lacks. `ConfigError` if it cannot be used."""
        self._folder = facts.folder
        self._tracker.open(facts, self._journal.run_key, live=True)
        self._is_open = True
        reader = self._journal.reader()
        self._thread = threading.Thread(
            target=self._run, args=(reader, facts.start_step > 0), name=f"hyperscale-{self._name}", daemon=True
        )
        self._notify()
        self._thread.start()

    def on_step(self, record: StepRecord) -> None:
        self._notify()

    def on_evaluation(self, record: EvaluationRecord) -> None:
        self._notify()

    def on_checkpoint(self, record: CheckpointRecord) -> None:
        self._notify()

    def on_run_end(self, outcome: RunOutcome) -> None:
        """Send what is left, within the limits. A failure here does not change how the run ended."""
        if self._thread is not None:
            self._finish(self._thread)
        self._thread = None
        if not self._is_open:
            return
        try:
            self._tracker.close()
        except Exception as error:  # noqa: BLE001 - the run has ended well
            _log.warning("%s could not be closed (%s)", self._name, first_line(error))

    def state(self) -> Mapping[str, Any]:
        return {self._name: dict(self._tracker.state())} if self._is_open else {}

    def _finish(self, thread: threading.Thread) -> None:
        now = time.monotonic()
        with self._changed:
            self._closing = self._has_news = True
            self._give_up_at = now + self._patience
            self._changed.notify_all()
        thread.join(self._patience)
        while thread.is_alive() and not self._is_failing and time.monotonic() < now + self._limit:
            thread.join(0.1)
        if not self._is_done or self._num_skipped:
            command = f"hyperscale track {self._folder} --to {self._name}"
            _log.warning("Some records did not reach %s; send them once it answers: %s", self._name, command)

    def _notify(self) -> None:
        with self._changed:
            self._has_news = True
            self._changed.notify_all()

    def _run(self, reader: EntryReader, is_resumed: bool) -> None:
        try:
            may_be_there = is_resumed
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._has_news or self._closing)
                    self._has_news = False
                    is_last = self._closing
                while entries := reader.read(_BATCH):
                    if not self._deliver(entries, may_be_there):
                        return
                may_be_there = False
                if is_last:
                    self._is_done = True
                    return
        finally:
            reader.close()

    def _deliver(self, entries: Sequence[Entry], may_be_there: bool) -> bool:
        """Push until the tracker accepts or rejects the entries. Return False when it is time to give up."""
        pause = _FIRST_PAUSE
        while True:
            try:
                self._tracker.push(entries, may_be_there)
            except Exception as error:  # noqa: BLE001 - no error of a vendor may end the thread
                may_be_there = True  # some of the entries may have arrived
                if not self._tracker.is_temporary(error):
                    if len(entries) > 1:  # find the entry that is rejected
                        return all(self._deliver([entry], may_be_there=True) for entry in entries)
                    self._skip(error)
                    return True
                if not self._is_failing:
                    _log.warning("%s does not answer; retrying (%s)", self._name, first_line(error))
                self._is_failing = True
                if self._rest(pause):
                    return False
                pause = min(2 * pause, _LONGEST_PAUSE)
            else:
                if self._is_failing:
                    _log.info("%s answers again", self._name)
                self._is_failing = False
                return True

    def _skip(self, error: Exception) -> None:
        self._num_skipped += 1
        if not self._has_warned:
            _log.warning("%s rejected a record: %s", self._name, first_line(error))
        self._has_warned = True

    def _rest(self, pause: float) -> bool:
        """Wait before the next attempt; return True when it is time to give up."""
        with self._changed:
            if not self._closing:
                self._changed.wait_for(lambda: self._closing, timeout=pause)
        if self._closing:
            time.sleep(min(_FIRST_PAUSE, max(0.0, self._give_up_at - time.monotonic())))
        return time.monotonic() >= self._give_up_at


def first_line(error: Exception) -> str:
    """Return an error's first line without secrets: vendors quote whole URIs."""
    return str(without_credentials((str(error).splitlines() or [type(error).__name__])[0]))[:300]
