"""Delivery in the background, so that no server can hold up a training step."""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from hyperscale.logger import get_logger

Item = TypeVar("Item")
Action = Callable[[], None]

_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 30.0
_log = get_logger(__name__)


class Outbox(Generic[Item]):
    """A thread that delivers items in batches, and actions between them, in the order in which they came.

    A failure that `is_temporary` is tried again until it succeeds or the box is closed; other failures are told and
    dropped. Beyond `capacity` the oldest items go: the JSONL mirror has them. `recipient` names the other side.
    """

    def __init__(
        self,
        deliver: Callable[[Sequence[Item]], None],
        is_temporary: Callable[[Exception], bool],
        recipient: str,
        capacity: int = 200_000,
        batch: int = 1000,
    ) -> None:
        self._deliver = deliver
        self._is_temporary = is_temporary
        self._recipient = recipient
        self._capacity = capacity
        self._batch = batch
        self._entries: deque[Item | _Errand] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._give_up_at = float("inf")
        self._is_failing = False
        self._has_refused = False
        self._is_abandoned = False
        self._num_lost = 0
        self._num_taken = 0
        self._thread = threading.Thread(target=self._run, name="hyperscale-outbox", daemon=True)
        self._thread.start()

    def put(self, items: Sequence[Item]) -> None:
        """Take items for delivery. Never waits and never raises."""
        with self._changed:
            self._entries.extend(items)
            while len(self._entries) > self._capacity:
                self._entries.popleft()
                self._num_lost += 1
            self._changed.notify_all()

    def call(self, action: Action) -> None:
        """Take something to be done after all that came before."""
        with self._changed:
            self._entries.append(_Errand(action))
            self._changed.notify_all()

    def close(self, patience: float, limit: float) -> int:
        """Wait for what is left, then stop; return how many items and actions were never delivered.

        Waits `patience` seconds while the other side does not answer, and `limit` seconds at the most.
        """
        now = time.monotonic()
        with self._changed:
            self._closing = True
            self._give_up_at = now + patience
            self._changed.notify_all()
        self._thread.join(patience)
        while self._thread.is_alive() and not self._is_failing and time.monotonic() < now + limit:
            self._thread.join(0.1)
        with self._changed:
            self._is_abandoned = True
            return len(self._entries) + self._num_taken + self._num_lost

    def _run(self) -> None:
        pause = _FIRST_PAUSE
        while work := self._next():
            try:
                self._do(work)
            except Exception as error:  # noqa: BLE001 - whatever a vendor raises must not end the thread
                if not self._is_temporary(error):
                    self._num_lost += len(work)
                    self._log_rejection(error)
                    continue
                self._put_back(work)
                self._log_failure(error)
                if self._rest(pause):
                    return
                pause = min(2 * pause, _LONGEST_PAUSE)
            else:
                if self._is_failing:
                    _log.info("%s answers again", self._recipient)
                self._is_failing = self._has_refused = False
                pause = _FIRST_PAUSE

    def _next(self) -> "list[Item | _Errand]":
        """Wait for entries and take a batch of items, or one errand; nothing when the box is closed and empty."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._entries) or self._closing)
            taken: list[Item | _Errand] = []
            while not self._is_abandoned and self._entries and len(taken) < self._batch:
                if taken and isinstance(self._entries[0], _Errand):
                    break
                taken.append(self._entries.popleft())
                if isinstance(taken[-1], _Errand):
                    break
            self._num_taken = len(taken)
            return taken

    def _do(self, work: "list[Item | _Errand]") -> None:
        items: list[Item] = []
        for entry in work:
            if isinstance(entry, _Errand):
                entry.action()
            else:
                items.append(entry)
        if items:
            self._deliver(items)

    def _put_back(self, work: "list[Item | _Errand]") -> None:
        with self._changed:
            self._entries.extendleft(reversed(work))
            self._num_taken = 0

    def _log_rejection(self, error: Exception) -> None:
        if not self._has_refused:
            _log.warning("%s refused what it was sent: %s", self._recipient, _first_line(error))
        self._has_refused = True

    def _log_failure(self, error: Exception) -> None:
        if not self._is_failing:
            _log.warning(
                "%s does not answer; the run goes on and sends it later (%s)", self._recipient, _first_line(error)
            )
        self._is_failing = True

    def _rest(self, pause: float) -> bool:
        """Wait before the next attempt; return True when it is time to give up."""
        with self._changed:
            if not self._closing:
                self._changed.wait_for(lambda: self._closing, timeout=pause)
        if self._closing:
            time.sleep(min(_FIRST_PAUSE, max(0.0, self._give_up_at - time.monotonic())))
        return time.monotonic() >= self._give_up_at


class _Errand:
    """An action in the queue."""

    def __init__(self, action: Action) -> None:
        self.action = action


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
