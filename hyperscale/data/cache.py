"""The cache of encoded rows: a folder for each task and fingerprint.

One process of a machine writes it, and all processes map it:


    <cache folder>/<task>/<fingerprint>/info.json
                                        train.arrow, validation.arrow, test.arrow

A folder appears whole, by a rename. Damaged files are noticed by their checksums and written again. Any folder may be
deleted at any time: a process that has it open keeps its rows.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hyperscale.assets.cache import building, cache_root, publish, sweep
from hyperscale.data.encoding import EntryInfo, read_info
from hyperscale.data.file_digest import checksum
from hyperscale.logger import get_logger

_logger = get_logger(__name__)

VARIABLE = "HYPERSCALE_DATA_CACHE"


def data_cache(setting: str | None) -> Path:
    """Return the folder of encoded rows: `data.cache_folder`, else `$HYPERSCALE_DATA_CACHE`, else in the cache."""
    chosen = setting or os.environ.get(VARIABLE)
    return Path(chosen).expanduser().absolute() if chosen else cache_root() / "encoded"


@dataclass(frozen=True)
class Entry:
    """The encoded rows of one task, in the cache."""

    folder: Path
    info: EntryInfo
    is_new: bool
    """Whether this process has just encoded them."""

    @property
    def num_bytes(self) -> int:
        return sum(split.bytes for split in self.info.splits.values())


def cached(folder: Path, task: str, key: str, write: Callable[[Path, Path], EntryInfo]) -> Entry:
    """Return a task's entry; if there is none, write it. Of several processes that ask, one writes.

    Args:
        folder: `data_cache(…)`.
        key: see `fingerprint`.
        write: writes the entry into its first argument, an empty folder; the second is for temporary files.

    Raises:
        AssetError: the folder cannot be written, or its disk is full.
    """
    target = folder / task / key
    if (info := _read(target)) is not None:
        return Entry(target, info, is_new=False)
    with building(target, f"data.cache_folder or {VARIABLE}") as scratch:
        if (info := _read(target)) is not None:
            return Entry(target, info, is_new=False)
        sweep(folder)
        built, texts = scratch / "entry", scratch / "texts"
        built.mkdir()
        texts.mkdir()
        info = write(built, texts)
        publish(built, target)
    return Entry(target, info, is_new=True)


def _read(target: Path) -> EntryInfo | None:
    """Return what a folder holds, or None if it does not exist or is damaged."""
    if not target.is_dir():
        return None
    try:
        info = read_info(target)
        for split, expected in info.splits.items():
            path = target / f"{split}.arrow"
            if path.stat().st_size != expected.bytes or checksum(path) != expected.xxh3:
                raise ValueError(f"{path.name} is not the file that was written")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _logger.warning("the encoded rows in %s are damaged and are encoded again: %s", target, error)
        return None
    return info
