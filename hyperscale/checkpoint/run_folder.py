"""One run writes in one folder at a time, and never over an earlier run by accident.

The owner of a run folder touches its lock every minute. Another host may take over a lock that has not been touched for
ten minutes: its host is gone. Both times come from the file system itself, so the clocks of the hosts may differ.
"""

import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Self

from hyperscale.checkpoint.layout import whole_checkpoints
from hyperscale.errors import RunFolderError
from hyperscale.logger import get_logger
from hyperscale.places import Place, open_place

_LOCK = "run.lock"
_REFRESH_SECONDS = 60.0
_LEASE_SECONDS = 600.0
"""Ten refreshes may fail before another host takes over."""
_log = get_logger(__name__)


@dataclass(frozen=True)
class Owner:
    """The process that writes in a run folder. Host, pid and start time together are never used twice."""

    host: str
    pid: int
    started: str
    """Clock ticks since boot, as the kernel counts them; empty where it does not tell."""
    since: str
    """When it claimed the folder, for people."""
    lease: float = 0.0
    """Seconds without a refresh after which another host may take over; 0, as in older locks, means never."""

    def is_alive(self, place: Place) -> bool:
        """Return False only if that process is known to be gone, or if its lease on the run folder has ended."""
        if self.host == socket.gethostname():
            return _start_time(self.pid) == self.started
        return not self.lease or _seconds_since_refresh(place) <= self.lease


@dataclass(frozen=True)
class RunFolder:
    """A claimed run folder. `release`, or the end of a `with` block, gives it up."""

    path: str
    """Absolute path or URI."""
    owner: Owner
    _released: threading.Event = field(default_factory=threading.Event, repr=False, compare=False)
    _lost: threading.Event = field(default_factory=threading.Event, repr=False, compare=False)
    _threads: list[threading.Thread] = field(default_factory=list, repr=False, compare=False)

    def keep(self) -> None:
        """Refresh the lease in a thread until the folder is released or another run has taken it."""
        thread = threading.Thread(target=self._refresh, name="hyperscale-lease", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _refresh(self) -> None:
        place = open_place(self.path)
        while not self._released.wait(_REFRESH_SECONDS):
            try:
                if not _renew(place, self.owner):
                    self._lost.set()
                    _log.error("%s", _taken_over(place, read_owner(place)))
                    return
            except Exception as error:  # noqa: BLE001 - storage libraries raise what they like; the next minute may do
                _log.warning("the lock of %s could not be refreshed: %s", place, error)

    def release(self) -> None:
        """Let other runs claim the folder. Does nothing if it is no longer ours."""
        self._released.set()
        for thread in self._threads:
            thread.join()
        place = open_place(self.path)
        with suppress(OSError):
            if not place.is_local:
                if read_owner(place) == self.owner:
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

    def __exit__(self, kind: object, *_error: object) -> None:
        self.release()
        if self._lost.is_set() and kind is None:
            place = open_place(self.path)
            raise _taken_over(place, read_owner(place))


def claim(folder: str, resume: bool) -> RunFolder:
    """Claim the run folder for this process, creating it if needed.

    The process that lives as long as the run calls this once: the driver, or rank 0 where there is none.
    `RunFolderError` if the place is a file or not writable, if another live run writes there, or if it holds an earlier
    run's checkpoints and `resume` is False. The lock of a process that died on this host is taken over,
    and that of another host once its lease has ended.
    """
    place = open_place(folder)
    owner = Owner(
        socket.gethostname(), os.getpid(), _start_time(os.getpid()), time.strftime("%Y-%m-%d %H:%M:%S"), _LEASE_SECONDS
    )
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
    claimed.keep()
    return claimed


def check_owner(place: Place, owner: Owner | None) -> None:
    """Raise `RunFolderError` if another run has taken the folder from `owner`; call this before every write there."""
    present = read_owner(place) if owner is not None else None
    if present is not None and present != owner:
        raise _taken_over(place, present)


def _taken_over(place: Place, present: Owner | None) -> RunFolderError:
    who = f"process {present.pid} on {present.host} writes there" if present else f"its {_LOCK} is gone"
    return RunFolderError(
        f"The run folder {place} was taken over: {who}. This run stops writing in it. "
        "Let the other run continue, or start this one again with another `output=`."
    )


def _renew(place: Place, owner: Owner) -> bool:
    """Give the lock the file system's present time; False if it is no longer the owner's."""
    if not place.is_local:
        if read_owner(place) != owner:
            return False
        place.fs.pipe_file(place.child(_LOCK).path, json.dumps(asdict(owner)).encode())
        return True
    with _exclusive(place.local_path / _LOCK) as lock:
        if _parse_owner(lock.read()) != owner:
            return False
        os.utime(lock.fileno())
    return True


def _seconds_since_refresh(place: Place) -> float:
    """Return the age of the lock by the storage's own clock; 0 where it keeps no times."""
    probe = place.child(f".clock-{uuid.uuid4().hex[:8]}")
    probe.fs.pipe_file(probe.path, b"now")
    try:
        place.fs.invalidate_cache()
        now, then = probe.fs.modified(probe.path), place.fs.modified(place.child(_LOCK).path)
        return float((now - then).total_seconds())
    except NotImplementedError:
        return 0.0
    finally:
        probe.fs.rm_file(probe.path)


def _lock_locally(folder: Path, owner: Owner) -> None:
    if folder.exists() and not folder.is_dir():
        raise RunFolderError(f"output={folder} is a file, but a run needs a folder. Choose another `output=`.")
    folder.mkdir(parents=True, exist_ok=True)
    with _exclusive(folder / _LOCK) as lock:
        _check_not_busy(_parse_owner(lock.read()), owner, open_place(str(folder)))
        lock.seek(0)
        lock.truncate(0)
        lock.write(json.dumps(asdict(owner)))
        lock.flush()
        os.fsync(lock.fileno())


def _lock_remotely(place: Place, owner: Owner) -> None:
    # fsspec has no exclusive create for object stores, so two starts within one round trip both succeed.
    _check_not_busy(read_owner(place), owner, place)
    place.fs.makedirs(place.path, exist_ok=True)
    place.fs.pipe_file(place.child(_LOCK).path, json.dumps(asdict(owner)).encode())


def _check_not_busy(holder: Owner | None, owner: Owner, place: Place) -> None:
    if holder is None:
        return
    if not holder.is_alive(place):
        if holder.host != owner.host:
            _log.warning(
                "taking over %s: process %d on %s no longer refreshes its lock", place, holder.pid, holder.host
            )
        return
    if holder.host == owner.host:
        who = "this very process" if holder.pid == owner.pid else f"process {holder.pid}"
        advice = "Stop it first"
    else:
        wait = f"wait {holder.lease / 60:.0f} minutes or " if holder.lease else ""
        who = f"process {holder.pid} on {holder.host}"
        advice = f"If that one is gone, {wait}delete {place.child(_LOCK)}"
    raise RunFolderError(
        f"The run folder is busy: {who} has been writing there since {holder.since}. "
        f"{advice}, or choose another `output=`."
    )


@contextmanager
def _exclusive(lock: Path) -> Iterator[IO[str]]:
    """Open the lock file, creating it, and keep other processes out of it while its content is read and written."""
    with lock.open("a+", encoding="utf-8") as stream:
        # Some network file systems have no flock. Then only the protection against two simultaneous starts is lost.
        with suppress(OSError):
            fcntl.flock(stream, fcntl.LOCK_EX)
        stream.seek(0)
        yield stream


def read_owner(place: Place) -> Owner | None:
    """Return who holds the lock of a run folder, if anyone."""
    place.fs.invalidate_cache()
    try:
        return _parse_owner(place.fs.cat_file(place.child(_LOCK).path).decode())
    except (FileNotFoundError, NotADirectoryError):
        return None


def _parse_owner(text: str) -> Owner | None:
    # Empty: the folder was released. Truncated: a process was killed while it claimed the folder.
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
