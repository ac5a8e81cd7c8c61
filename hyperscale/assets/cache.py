"""Where fetched and derived assets lie, and how several processes build one of them without seeing it half-written."""

import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hyperscale.errors import AssetError
from hyperscale.logger import get_logger

_log = get_logger(__name__)

_FOLDER_FAULTS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT}
"""What a user mends by choosing another folder; any other OSError while building is a defect of ours and stays one."""


def cache_root() -> Path:
    """Return the folder of everything fetched: `$HYPERSCALE_CACHE`, else `hyperscale` in the user's cache folder."""
    chosen = os.environ.get("HYPERSCALE_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "hyperscale"


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def building(target: Path) -> Iterator[Path]:
    """Wait for the sole right to build `target`, then yield an empty scratch folder on the same file system.

    The caller looks again whether another process has built `target` meanwhile, writes into the scratch folder and
    moves the result into place with `publish`. What is left in the scratch folder is removed, also that of a process
    that was killed. Raises `AssetError` where the cache folder cannot be written or locked.
    """
    scratch = target.parent / f".{target.name}.partial"
    lock = target.parent / f".{target.name}.lock"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        stream = lock.open("a")
    except OSError as error:
        raise _unusable(target, error) from error
    with stream:
        _wait_for_lock(stream.fileno(), target)
        try:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir()
            yield scratch
        except OSError as error:
            if error.errno in _FOLDER_FAULTS:
                raise _unusable(target, error) from error
            raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def publish(built: Path, target: Path) -> None:
    """Move a finished file or folder to `target` in one rename, replacing what lies there."""
    if target.is_dir():
        shutil.rmtree(target)
    built.replace(target)


def _wait_for_lock(descriptor: int, target: Path) -> None:
    # The kernel drops the lock with the process, so a kill -9 leaves nothing to clear up.
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        _log.info("waiting for another process that is preparing %s", target)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        raise _unusable(target, error) from error


def _unusable(target: Path, error: OSError) -> AssetError:
    return AssetError(
        f"Cannot prepare {target}: {error.strerror}. "
        "Set HYPERSCALE_CACHE to a folder that you can write to, with room, on a file system with locks."
    )
