"""Bundles on an object store, which has no rename: readers see a whole bundle or none."""

from pathlib import Path

from hyperscale.export.bundle import MANIFEST
from hyperscale.export.peft_format import CONFIG
from hyperscale.places import Place

_ENTRIES = (CONFIG, MANIFEST)
"""The files by which a reader knows a bundle: PEFT and vLLM open the first, this package the second."""


def put_bundle(folder: Path, target: Place) -> None:
    """Copy a local bundle to `target`, and replace an earlier one there.

    The files by which readers know a bundle are removed first and written last, the manifest after all others. A bundle
    that lies there already, whole and the same, is left alone.
    """
    manifest = folder / MANIFEST
    if _content(target.child(MANIFEST)) == manifest.read_bytes():
        return
    new, present = {file.name for file in folder.iterdir()}, {place.name for place in target.children()}
    for name in (*reversed(_ENTRIES), *sorted(present - new - set(_ENTRIES))):
        if name in present:
            target.fs.rm_file(target.child(name).path)
    target.fs.makedirs(target.path, exist_ok=True)
    for name in (*sorted(new - set(_ENTRIES)), *(entry for entry in _ENTRIES if entry in new)):
        target.fs.put_file(str(folder / name), target.child(name).path)


def _content(place: Place) -> bytes | None:
    try:
        content: bytes = place.fs.cat_file(place.path)
    except FileNotFoundError:
        return None
    return content
