"""A request to stop this run: it saves its current step and ends, on all ranks after the same step."""

import time
from dataclasses import dataclass, field

from hyperscale.checkpoint.stop_file import requested_stop
from hyperscale.logger import get_logger
from hyperscale.places import open_place

_logger = get_logger(__name__)

_LOCAL_SECONDS, _REMOTE_SECONDS = 0.5, 5.0
"""How often rank 0 looks into its run folder, on a file system and on an object store."""


@dataclass
class StopRequest:
    """What this rank knows of a wish to stop. The ranks agree on it in every step (`StepResult.is_last`)."""

    reason: str | None = None
    """Who asked: `SIGTERM`, `hyperscale stop`; None = nobody."""
    can_save: bool = False
    """Whether the run is between its first and its last step. Outside it there is nothing to save."""
    _looked: float = field(default=float("-inf"), repr=False)

    def make(self, reason: str) -> None:
        """Ask this rank's run to stop; the first reason stays."""
        self.reason = self.reason or reason

    def answer_signal(self, name: str) -> bool:
        """Take up a signal; returns False if there is nothing to save, so that the process may end at once."""
        if self.reason is None and self.can_save:
            self.make(name)
            _logger.warning("%s: the run saves its current step and ends", name)
        return self.reason is not None

    def look_into(self, folder: str) -> None:
        """Take up a request that lies in the run folder, at most every half second, or 5 s on an object store."""
        interval = _LOCAL_SECONDS if open_place(folder).is_local else _REMOTE_SECONDS
        if self.reason is None and time.monotonic() - self._looked >= interval:
            self._looked = time.monotonic()
            self.reason = requested_stop(folder)
