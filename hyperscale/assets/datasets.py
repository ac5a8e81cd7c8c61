"""Packaged data sets: built once from pinned packages, with fixed splits, and stored as JSONL with digests.

The splits depend only on the text of the rows, not on random numbers, the order of files or Python's hash seed.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hyperscale.assets import sentiment, words
from hyperscale.assets.cache import building, cache_root, publish, sha256_of
from hyperscale.assets.packages import PinnedPackage
from hyperscale.errors import DataError, nearest
from hyperscale.logger import get_logger

_log = get_logger(__name__)

_SPLITS = {"train": 0.8, "validation": 0.9, "test": 1.0}
"""Upper bound of each split's share of the key space."""


@dataclass(frozen=True)
class PackagedDataset:
    """How the rows of one asset are built."""

    version: int
    """Increase it when the same packages give other rows, so that folders of older releases are rebuilt."""
    packages: tuple[PinnedPackage, ...]
    subsets: tuple[str, ...]
    rows: Callable[[str], Iterable[tuple[str, dict[str, str]]]]
    """subset -> (split key, row) pairs; rows with equal keys are in the same split."""


DATASETS = {
    "vader_sentiment": PackagedDataset(1, (sentiment.PACKAGE,), sentiment.SUBSETS, sentiment.rows),
    "lemminflect_words": PackagedDataset(
        1, (words.LEMMINFLECT, sentiment.PACKAGE), words.INFLECTIONS, words.inflections
    ),
    "breame_spelling": PackagedDataset(1, (words.BREAME,), ("american",), words.spellings),
}


def open_dataset(asset: str, subset: str) -> Mapping[str, Path]:
    """Return split name -> JSONL file in the cache. The first call builds the files; every call checks their digests.

    `info.json` in the same folder holds the packages with their licences, and the rows, label counts and digest of
    each split. Several processes may call this at once.

    Raises:
        DataError: the name is unknown.
        AssetError: a package cannot be fetched.
    """
    dataset = DATASETS.get(asset)
    if dataset is None:
        raise DataError(
            f"There is no packaged data set '{asset}'. Known: {', '.join(DATASETS)}.{nearest(asset, DATASETS)}"
        )
    if subset not in dataset.subsets:
        raise DataError(
            f"The packaged data set '{asset}' has no subset '{subset}'. Known: {', '.join(dataset.subsets)}."
            f"{nearest(subset, dataset.subsets)}"
        )
    folder = cache_root() / "datasets" / asset / subset
    files = {split: folder / f"{split}.jsonl" for split in _SPLITS}
    origin = {"asset": asset, "subset": subset, "version": dataset.version} | {
        "packages": [asdict(package) for package in dataset.packages]
    }
    if not _is_whole(folder, files, origin):
        with building(folder) as scratch:
            if not _is_whole(folder, files, origin):
                _log.info("preparing %s/%s", asset, subset)
                built = scratch / subset
                built.mkdir()
                _write(built, asset, dataset.rows(subset), origin)
                publish(built, folder)
    return files


def _write(folder: Path, asset: str, rows: Iterable[tuple[str, dict[str, str]]], origin: dict[str, Any]) -> None:
    splits: dict[str, list[dict[str, str]]] = {split: [] for split in _SPLITS}
    for key, row in rows:
        position = _position(f"{asset} {key}")
        splits[next(split for split, end in _SPLITS.items() if position < end)].append(row)
    facts: dict[str, Any] = {}
    for split, chosen in splits.items():
        # Neighbours come from one document or one letter of the alphabet, but the first n rows should be a mix.
        chosen.sort(key=lambda row: _position(json.dumps(row)))
        path = folder / f"{split}.jsonl"
        path.write_text("".join(_lines(chosen)), encoding="utf-8", newline="\n")
        labels = Counter(row["label"] for row in chosen if "label" in row)
        facts[split] = {"rows": len(chosen), "labels": dict(sorted(labels.items())), "sha256": sha256_of(path)}
    (folder / "info.json").write_text(json.dumps(origin | {"splits": facts}, indent=2) + "\n", encoding="utf-8")


def _lines(rows: Iterable[dict[str, str]]) -> Iterator[str]:
    return (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _position(text: str) -> float:
    """Return a number in [0, 1) that depends only on the text and is evenly distributed."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6]) / 2**48


def _is_whole(folder: Path, files: Mapping[str, Path], origin: dict[str, Any]) -> bool:
    try:
        info = json.loads((folder / "info.json").read_text(encoding="utf-8"))
        return all(info[name] == value for name, value in origin.items()) and all(
            sha256_of(path) == info["splits"][split]["sha256"] for split, path in files.items()
        )
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False
