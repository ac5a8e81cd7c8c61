"""Digests of files, to know whether their content is what it was."""

import json
import os
import time
from pathlib import Path
from typing import Any

import xxhash

_REMEMBERED_SIZE = 64 * 2**20
"""Files of this size and more are not read again at every start."""


def checksum(path: Path) -> str:
    """Return the XXH3 checksum of a file, in hexadecimal. It guards against damage, not against intent."""
    digest = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return str(digest.hexdigest())


def file_digest(path: Path, memory: Path | None = None) -> str:
    """Return a digest of a file's content.

    A large file is read once: its digest is kept in the folder `memory` for as long as its place, size and times stay.
    """
    status = path.stat()
    if memory is None or status.st_size < _REMEMBERED_SIZE:
        return checksum(path)
    state = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
    note = memory / f"{xxhash.xxh3_64_hexdigest(os.path.realpath(path).encode())}.json"
    try:
        kept = json.loads(note.read_text(encoding="utf-8"))
        if kept["state"] == state:
            return str(kept["digest"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    digest = checksum(path)
    if time.time_ns() - status.st_mtime_ns > 2 * 10**9:  # else a write within the clock's tick could go unnoticed
        _keep(note, {"state": state, "digest": digest})
    return digest


def _keep(note: Path, content: dict[str, Any]) -> None:
    partial = note.with_name(f"{note.name}.{os.getpid()}.partial")
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(content), encoding="utf-8")
        partial.replace(note)
    except OSError:
        partial.unlink(missing_ok=True)  # a cache that cannot be written is reported where it must be
