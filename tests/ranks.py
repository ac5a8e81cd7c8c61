"""Real gloo ranks on this machine that run a test's own functions.

Starting two costs about 10 s of imports, so they stay and take one call after another:

    with started_ranks(2) as ranks:
        first, second = ranks.run(function_of_a_module, "its arguments")
"""

import multiprocessing
import os
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

START_SECONDS = 90.0
CALL_SECONDS = 90.0


class RanksFailed(AssertionError):  # noqa: N818 (they failed, and with them the test)
    """A rank raised, died or took too long; all of them have been killed."""


class Ranks:
    """A process group. After a failed call the next one starts new processes."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []
        self._folder: str | None = None

    def run(self, function: Callable[..., Any], *arguments: Any, seconds: float = CALL_SECONDS) -> list[Any]:
        """Call a function of a module on every rank, at the same time; return what each returned, by rank.

        Raises:
            RanksFailed: with the traceback of the rank that raised, or the exit code of the one that died.
        """
        try:
            if not self._processes:
                self._start()
            for pipe in self._pipes:
                pipe.send((function, arguments))
            return self._collect(seconds)
        except BaseException:
            self.stop()
            raise

    def _start(self) -> None:
        # Not pytest's tmp_path: that can be too long for whoever puts a socket there.
        self._folder = tempfile.mkdtemp(prefix="ranks-")
        store = os.path.join(self._folder, "store")  # noqa: PTH118 (a string for torch)
        context = multiprocessing.get_context("spawn")
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.world_size, store, theirs), daemon=True)
            process.start()
            theirs.close()  # or a dead rank's pipe would never end
            self._processes.append(process)
            self._pipes.append(ours)
        self._collect(START_SECONDS)

    def _collect(self, seconds: float) -> list[Any]:
        deadline = time.monotonic() + seconds
        answers: dict[int, Any] = {}
        while len(answers) < self.world_size:
            waiting = [pipe for rank, pipe in enumerate(self._pipes) if rank not in answers]
            ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                late = [rank for rank in range(self.world_size) if rank not in answers]
                raise RanksFailed(f"ranks {late} did not return within {seconds:g} s")
            for pipe in ready:
                rank = self._pipes.index(pipe)  # type: ignore[arg-type]
                answers[rank] = self._receive(rank)
        return [answers[rank] for rank in range(self.world_size)]

    def _receive(self, rank: int) -> Any:
        try:
            error, value = self._pipes[rank].recv()
        except (EOFError, ConnectionResetError) as gone:
            self._processes[rank].join(5)
            raise RanksFailed(f"rank {rank} died with exit code {self._processes[rank].exitcode}") from gone
        if error is not None:
            raise RanksFailed(f"rank {rank} raised:\n{error}")
        return value

    def stop(self) -> None:
        """Kill the processes, which may hang in a collective, and remove what they met at."""
        for process in self._processes:
            process.kill()
            process.join()
            process.close()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None


@contextmanager
def started_ranks(world_size: int) -> Iterator[Ranks]:
    """Ranks that start with the first call and are gone at the end of the `with`."""
    ranks = Ranks(world_size)
    try:
        yield ranks
    finally:
        ranks.stop()


def _serve(rank: int, world_size: int, store: str, pipe: Connection) -> None:
    """One rank: join the group, then answer calls until the test process closes its end or dies."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), DS_ACCELERATOR="cpu")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    meeting = dist.FileStore(str(Path(store)), world_size)
    dist.init_process_group(
        "gloo", store=meeting, rank=rank, world_size=world_size, timeout=timedelta(seconds=START_SECONDS)
    )
    pipe.send((None, None))
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            answer = (None, function(*arguments))
        except Exception:  # noqa: BLE001 (whatever it is, the test process shows it)
            answer = (traceback.format_exc(), None)
        pipe.send(answer)
