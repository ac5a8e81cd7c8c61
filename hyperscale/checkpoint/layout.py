"""Where things lie in a run folder, and which of its checkpoints count.

    <run folder>/checkpoints/step-000100/{<name>.safetensors …, state.json, manifest.json, recipe.yaml, COMMITTED}

A run folder is a local (or NFS) path or any fsspec URI (`s3://…`, `memory://…`). Imports no torch, so that a driver
can look into a run folder cheaply.
"""

import re
from dataclasses import dataclass
from typing import Any

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from hyperscale.errors import RunFolderError

CHECKPOINTS = "checkpoints"
MARKER = "COMMITTED"
STATE = "state.json"
MANIFEST = "manifest.json"
RECIPE = "recipe.yaml"
TENSORS_SUFFIX = ".safetensors"

_NAME = re.compile(r"step-(?P<step>\d{6,})(-(?P<attempt>\d+))?")


@dataclass(frozen=True)
class Place:
    """A path on some file system, local or remote."""

    fs: Any
    path: str

    @property
    def is_local(self) -> bool:
        return isinstance(self.fs, LocalFileSystem)

    @property
    def name(self) -> str:
        return self.path.rstrip("/").rpartition("/")[2]

    @property
    def parent(self) -> "Place":
        return Place(self.fs, self.path.rstrip("/").rpartition("/")[0])

    def child(self, name: str) -> "Place":
        return Place(self.fs, f"{self.path.rstrip('/')}/{name}")

    def children(self) -> tuple["Place", ...]:
        """Return what lies here, in the order of names; nothing if the place does not exist."""
        # Object stores cache their listings: another process may have written since.
        self.fs.invalidate_cache()
        try:
            found = self.fs.ls(self.path, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return ()
        names = {str(entry).rstrip("/").rpartition("/")[2] for entry in found}
        return tuple(self.child(name) for name in sorted(names))

    def exists(self) -> bool:
        return bool(self.fs.exists(self.path))

    def __str__(self) -> str:
        return self.path if self.is_local else str(self.fs.unstrip_protocol(self.path))


def open_place(folder: str) -> Place:
    """Return the place of a path or URI; `RunFolderError` if its protocol is unknown or needs a missing package."""
    try:
        fs, path = url_to_fs(folder)
    except (ValueError, ImportError) as error:
        raise RunFolderError(f"{folder}: {error}. Use a path, or install the package for this URI.") from error
    return Place(fs, path)


def checkpoint_name(step: int, attempt: int = 1) -> str:
    """Return the folder name of a step's checkpoint; a step that is saved anew gets the next attempt."""
    return f"step-{step:06d}" if attempt == 1 else f"step-{step:06d}-{attempt}"


def parse_name(name: str) -> tuple[int, int] | None:
    """Return (step, attempt) of a checkpoint's folder name, or None if it is something else."""
    match = _NAME.fullmatch(name)
    return (int(match["step"]), int(match["attempt"] or 1)) if match else None


def whole_checkpoints(run: Place) -> tuple[Place, ...]:
    """Return the committed checkpoints of a run folder, oldest first."""
    dated = [(parse_name(place.name), place) for place in run.child(CHECKPOINTS).children()]
    whole = [(key, place) for key, place in dated if key is not None and place.child(MARKER).exists()]
    return tuple(place for _, place in sorted(whole, key=lambda pair: pair[0]))
