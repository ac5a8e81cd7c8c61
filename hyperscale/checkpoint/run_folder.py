"""One run writes in one folder at a time, and never over an earlier run by accident."""

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Self

from hyperscale.checkpoint.layout import whole_checkpoints
from hyperscale.errors import RunFolderError
from hyperscale.places import Place, open_place

_LOCK = "run.lock"


@dataclass(frozen=True)
class Owner:
    """The process that writes in a run folder. Host, pid and start time together are never used twice."""

    host: str
    pid: int
    started: str
    """Clock ticks since boot, as the kernel counts them; empty where it does not tell."""
    since: str
    """When it claimed the folder, for people."""

    def is_alive(self) -> bool:
        """Return False only if that process is known to be gone: it ran on this host and runs no more."""
        return self.host != socket.gethostname() or _start_time(self.pid) == self.started


@dataclass(frozen=True)
class RunFolder:
    """A claimed run folder; give it back with `release` or a `with` block."""

    path: str
    """Absolute path or URI."""
    owner: Owner

    def release(self) -> None:
        """Let other runs claim the folder. Does nothing if it is no longer ours."""
        place = open_place(self.path)
        with suppress(OSError):
            if not place.is_local:
                if _read_owner(place) == self.owner:
                    place.fs.rm_file(place.child(_LOCK).path)
                return
            if not (place.local_path / _LOCK).exists():
                return
            with _exclusive(place.local_path / _LOCK) as lock:
                if _parse_owner(lock.read()) == self.owner:
                    # Emptied, not deleted: a process that has opened it already would lock a file that is gone.
                    lock.truncate(0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


def claim(folder: str, resume: bool) -> RunFolder:
    """Make the run folder this process's own, creating it if needed.

    The process that lives as long as the run calls this once: the driver, or rank 0 where there is none.
    `RunFolderError` if the place is a file or not writable, if another live run writes there, or if it holds an earlier
    run's checkpoints and `resume` is False. The lock of a process that died on this host is taken over.
    """
    place = open_place(folder)
    owner = Owner(socket.gethostname(), os.getpid(), _start_time(os.getpid()), time.strftime("%Y-%m-%d %H:%M:%S"))
    claimed = RunFolder(str(place), owner)
    try:
        if place.is_local:
            _lock_locally(place.local_path, owner)
        else:
            _lock_remotely(place, owner)
        earlier = whole_checkpoints(place)
    except OSError as error:
        claimed.release()
        reason = f"{error.strerror} ({error.filename})" if error.strerror and error.filename else str(error)
        raise RunFolderError(f"output={folder} cannot be written: {reason}. Choose another `output=`.") from error
    if earlier and not resume:
        claimed.release()
        raise RunFolderError(
            f"output={folder} holds an earlier run (its last checkpoint is {earlier[-1].name}). "
            "Continue it with --resume, or choose another `output=`."
        )
    return claimed


def _lock_locally(folder: Path, owner: Owner) -> None:
    if folder.exists() and not folder.is_dir():
        raise RunFolderError(f"output={folder} is a file, a run needs a folder. Choose another `output=`.")
    folder.mkdir(parents=True, exist_ok=True)
    with _exclusive(folder / _LOCK) as lock:
        _check_not_busy(_parse_owner(lock.read()), owner, str(folder / _LOCK))
        lock.seek(0)
        lock.truncate(0)
        lock.write(json.dumps(asdict(owner)))
        lock.flush()
        os.fsync(lock.fileno())


def _lock_remotely(place: Place, owner: Owner) -> None:
    # fsspec reaches no exclusive create on object stores: two starts within one round trip are not told apart.
    _check_not_busy(_read_owner(place), owner, str(place.child(_LOCK)))
    place.fs.makedirs(place.path, exist_ok=True)
    place.fs.pipe_file(place.child(_LOCK).path, json.dumps(asdict(owner)).encode())


def _check_not_busy(holder: Owner | None, owner: Owner, lock: str) -> None:
    if holder is None or not holder.is_alive():
        return
    if holder.host == owner.host:
        who = "this very process" if holder.pid == owner.pid else f"process {holder.pid}"
        advice = "Stop it first"
    else:
        who, advice = f"process {holder.pid} on {holder.host}", f"If that one is gone, delete {lock}"
    raise RunFolderError(
        f"The run folder is busy: {who} has been writing there since {holder.since}. "
        f"{advice}, or choose another `output=`."
    )


@contextmanager
def _exclusive(lock: Path) -> Iterator[IO[str]]:
    """Open the lock file, creating it, and keep other processes out of it while its content is read and written."""
    with lock.open("a+", encoding="utf-8") as stream:
        # Some network file systems have no flock: what is lost is only the protection of two starts in one moment.
        with suppress(OSError):
            fcntl.flock(stream, fcntl.LOCK_EX)
        stream.seek(0)
        yield stream


def _read_owner(place: Place) -> Owner | None:
    place.fs.invalidate_cache()
    try:
        return _parse_owner(place.fs.cat_file(place.child(_LOCK).path).decode())
    except FileNotFoundError:
        return None


def _parse_owner(text: str) -> Owner | None:
    # Empty: released. Cut off: its writer was killed while it claimed.
    try:
        return Owner(**json.loads(text))
    except (ValueError, TypeError):
        return None


def _start_time(pid: int) -> str:
    """Return when a process started, "" if it is gone or a zombie. Without /proc: "alive" or ""."""
    if not Path("/proc/self/stat").exists():
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return ""
        except PermissionError:
            pass
        return "alive"
    try:
        # The name in parentheses may hold spaces; the state and the 22nd field come after it (proc_pid_stat(5)).
        fields = Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
