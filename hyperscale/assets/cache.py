"""The cache of fetched and derived assets. Several processes can build one without seeing it half-written."""

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from hyperscale.errors import AssetError
from hyperscale.logger import get_logger

_log = get_logger(__name__)

_FOLDER_FAULTS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT}
"""Errors that a user can fix by choosing another folder. Any other OSError while building is a bug and stays one."""


def cache_root() -> Path:
    """Return the cache folder: `$HYPERSCALE_CACHE`, else `hyperscale` in the user's cache folder."""
    chosen = os.environ.get("HYPERSCALE_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "hyperscale"


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def building(target: Path, setting: str = "HYPERSCALE_CACHE") -> Iterator[Path]:
    """Lock `target`, then yield an empty scratch folder on the same file system.

    The caller checks again whether another process has built `target` meanwhile, writes into the scratch folder, and
    moves the result into place with `publish`. Anything left in the scratch folder is removed, also after a process
    was killed.

    Args:
        setting: names the folder in messages.

    Raises:
        AssetError: the cache folder cannot be written or locked.
    """
    scratch = target.parent / f".{target.name}.partial"
    with _locked(target, setting):
        try:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir()
            yield scratch
        except OSError as error:
            if error.errno in _FOLDER_FAULTS:
                raise _unusable(target, error, setting) from error
            raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove the scratch folders that killed processes left below `folder`; those in use are locked and stay."""
    for scratch in folder.glob("**/.*.partial"):
        lock = _lock_of(scratch.with_name(scratch.name[1:].removesuffix(".partial")))
        try:
            with lock.acquire(blocking=False):
                shutil.rmtree(scratch, ignore_errors=True)
        except (Timeout, OSError):
            continue  # in use, or not ours to remove


def publish(built: Path, target: Path) -> None:
    """Move a finished file or folder to `target` in one rename; an existing one is replaced."""
    if target.is_dir():
        shutil.rmtree(target)
    built.replace(target)


def _lock_of(target: Path) -> FileLock:
    return FileLock(target.parent / f".{target.name}.lock")


@contextmanager
def _locked(target: Path, setting: str) -> Iterator[None]:
    # The kernel releases the lock when the process ends, so a kill -9 leaves nothing to clean up.
    lock = _lock_of(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            _log.info("waiting for another process that is preparing %s", target)
            lock.acquire()
    except OSError as error:
        raise _unusable(target, error, setting) from error
    try:
        yield
    finally:
        lock.release()


def _unusable(target: Path, error: OSError, setting: str) -> AssetError:
    return AssetError(
        f"Cannot prepare {target}: {error.strerror}. "
        f"Set {setting} to a writable folder with enough space, on a file system that supports locks."
    )
