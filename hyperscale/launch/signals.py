"""What SIGINT and SIGTERM do to a run: it saves its current step before it ends."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from hyperscale.checkpoint.stop_file import request_stop
from hyperscale.errors import RunFolderError, RunStopped
from hyperscale.logger import get_logger

_logger = get_logger(__name__)

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Terminated(KeyboardInterrupt):
    """SIGTERM ended the run at once: before its first step, or because it came twice."""

    exit_code = 143


def ask_to_stop(folder: str, name: str) -> bool:
    """Ask the workers of a run, in other processes, to stop; `name` is that of the signal.

    Returns False where the request cannot be written.
    """
    try:
        request_stop(folder, name)
    except RunFolderError as error:
        _logger.warning("%s: %s", name, error)
        return False
    _logger.warning("%s: the run saves its current step and ends; a second signal ends it at once", name)
    return True


@contextmanager
def stopping_on_signals(stop: Callable[[str], bool], ends_at_second: bool = True) -> Iterator[list[int]]:
    """Call `stop` with the name of the first signal that arrives inside the block.

    Outside the main thread, where Python cannot set handlers, the block runs as it is.

    Args:
        stop: asks the run to stop; returns False if the run has nothing to save, and the block then ends at once.
        ends_at_second: let a second signal end the block at once.

    Yields:
        The numbers of the signals that have arrived.

    Raises:
        KeyboardInterrupt: the block ends at once; `Terminated` after SIGTERM.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def handle(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        is_first = len(received) == 1
        if is_first and stop(signal.Signals(number).name):
            return
        if is_first or ends_at_second:
            raise Terminated if number == signal.SIGTERM else KeyboardInterrupt

    # A shell starts background jobs with SIGINT ignored, and `nohup` counts on such a choice.
    heeded = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handle) for number in heeded}
    try:
        yield received
    except RunStopped as error:
        if received:
            error.exit_code = 128 + received[0]
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
