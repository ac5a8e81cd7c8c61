"""A path on any file system: local, NFS, or an fsspec URI such as `s3://…` or `memory://…`.

Whatever a user may put on an object store (run folders, checkpoints, the bundles of a run) goes through `open_place`.
`pathlib.Path` turns `s3://bucket/run` into the local folder `s3:/bucket/run`, so it is for local files alone.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from hyperscale.errors import RunFolderError

_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


@dataclass(frozen=True)
class Place:
    """A path on some file system, local or remote."""

    fs: Any
    path: str

    @property
    def is_local(self) -> bool:
        return isinstance(self.fs, LocalFileSystem)

    @property
    def local_path(self) -> Path:
        """The same as a `Path`; `RunFolderError` if the place is remote."""
        if not self.is_local:
            raise RunFolderError(f"{self} is not on this machine. Give a local folder.")
        return Path(self.path)

    @property
    def name(self) -> str:
        return self.path.rstrip("/").rpartition("/")[2]

    @property
    def parent(self) -> "Place":
        return Place(self.fs, self.path.rstrip("/").rpartition("/")[0])

    def child(self, name: str) -> "Place":
        return Place(self.fs, f"{self.path.rstrip('/')}/{name}")

    def children(self) -> tuple["Place", ...]:
        """Return the entries of this folder, sorted by name; none if the folder does not exist."""
        # Object stores cache their listings: another process may have written since.
        self.fs.invalidate_cache()
        try:
            entries = self.fs.ls(self.path, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return ()
        names = {str(entry).rstrip("/").rpartition("/")[2] for entry in entries}
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
    return Place(fs, os.path.abspath(path) if isinstance(fs, LocalFileSystem) else path)


def is_uri(path: str | Path) -> bool:
    """Tell a URI from a local path; also a `Path` made from a URI, which has lost a slash."""
    return _URI.match(str(path)) is not None


def local_path(path: str | Path) -> Path:
    """Return a path that must be on this machine; a relative path stays relative.

    Raises:
        RunFolderError: it is a URI.
    """
    if is_uri(path):
        raise RunFolderError(f"{path} is a URI, and this needs a folder or file on this machine. Give a local path.")
    return Path(path)
