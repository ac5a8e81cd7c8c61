"""A folder that is written whole or not at all."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hyperscale.errors import BundleError

_OLD = ".old"


@contextmanager
def whole_folder(target: Path, what: str) -> Iterator[Path]:
    """Yield an empty folder beside `target` that takes its place when the block ends without an error.

    Raises:
        BundleError: a file cannot be written; `what` names it, for example `bundle`.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise BundleError(
            f"{what}s cannot be written to {target.parent}: {error.strerror}; choose another folder"
        ) from error
    try:
        recover_folder(target)
        yield building
        _open_to_readers(building)
        replace_folder(building, target)
    except OSError as error:
        raise BundleError(f"{what} {target} cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)


def replace_folder(built: Path, target: Path) -> None:
    """Put a finished folder in the place of an earlier one, which is deleted only when the new one is there.

    A kill between the two renames leaves the earlier folder as `.<name>.old`; the next write puts it back first.
    """
    old = target.with_name(f".{target.name}{_OLD}")
    recover_folder(target)
    if target.exists():
        target.rename(old)
    try:
        built.rename(target)
    except OSError:
        recover_folder(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def recover_folder(target: Path) -> None:
    """Put back the folder that a killed replacement moved aside, or delete what it left."""
    old = target.with_name(f".{target.name}{_OLD}")
    if old.exists() and not target.exists():
        old.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _open_to_readers(folder: Path) -> None:
    """Undo the private modes of temporary folders and files: a server may run as another user."""
    folder.chmod(0o755)
    for file in folder.iterdir():
        file.chmod(0o644)
