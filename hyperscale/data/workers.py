"""Processes that render and encode rows beside the one that reads and writes them."""

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from types import TracebackType
from typing import Any, Self

from loky import ProcessPoolExecutor

from hyperscale.errors import DataError
from hyperscale.logger import get_logger

_logger = get_logger(__name__)

_OWN_CHUNKS = 4
"""Chunks that this process works on before it starts others: starting them takes seconds."""

_served: Any = None


class Workers:
    """Calls methods of one object on many chunks, in order, in as many processes as this one may use cores.

    Small inputs never start a process. At most two chunks for each process are in flight, so a stream stays a stream.
    """

    def __init__(self, served: Any, name: str) -> None:
        """`served`: the object; every process gets a copy. `name`: what the chunks are, for the log."""
        self._served = served
        self._name = name
        self._cores = len(os.sched_getaffinity(0))
        self._executor: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=True, kill_workers=error is not None)

    def map(self, method: str, chunks: Iterable[Any]) -> Iterator[Any]:
        """Yield `served.method(chunk)` for each chunk, in order.

        Raises:
            DataError: a process was killed.
        """
        waiting = iter(chunks)
        call = getattr(self._served, method)
        yield from map(call, islice(waiting, _OWN_CHUNKS))
        if self._cores == 1:
            yield from map(call, waiting)
            return
        pending: deque[Future[Any]] = deque()
        try:
            for chunk in waiting:
                pending.append(self._started().submit(_call, method, chunk))
                if len(pending) >= 2 * self._cores:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool as error:
            raise DataError(
                f"{self._name}: a process that encodes rows was killed, perhaps for its memory. Free some memory, or "
                "allow fewer cores (taskset), and start again"
            ) from error

    def _started(self) -> Any:
        if self._executor is None:
            _logger.info("%s: many rows, encoding them with %d processes", self._name, self._cores)
            environment = {"TOKENIZERS_PARALLELISM": "false"}
            self._executor = ProcessPoolExecutor(
                self._cores, initializer=_serve, initargs=(self._served,), env=environment
            )
        return self._executor


def _serve(served: Any) -> None:
    global _served  # noqa: PLW0603  # one object for the life of the process
    _served = served


def _call(method: str, chunk: Any) -> Any:
    return getattr(_served, method)(chunk)
