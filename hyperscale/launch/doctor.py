"""`hyperscale doctor`: what this machine has for a run, and what is missing."""

import importlib.metadata
import os
import platform
import shutil
from pathlib import Path

import torch

from hyperscale.assets.cache import cache_root
from hyperscale.tracking.provenance import package_versions
from hyperscale.tracking.trackers import needed_packages

_NEEDED_FOR = {
    "deepspeed": "engine.kind=zero",
    "ray": "--launcher ray and submit",
    **needed_packages(),
}


def examine() -> int:
    """Print a line per fact; returns 1 if something that training needs is missing."""
    lines = [f"python {platform.python_version()} on {platform.machine()}, {len(os.sched_getaffinity(0))} cores"]
    lines += [f"{name} {version}" for name, version in package_versions().items()]
    lines.append(_accelerator())
    free = shutil.disk_usage(_existing(cache_root())).free / 2**30
    lines.append(f"cache {cache_root()} ({free:.0f} GiB free)")
    missing = [f"missing: {name}, needed for {use}" for name, use in _NEEDED_FOR.items() if not _is_installed(name)]
    print("\n".join([*lines, *(missing or ["nothing is missing"])]))
    return 1 if missing else 0


def _accelerator() -> str:
    if not torch.cuda.is_available():
        return "no CUDA device: workers run on CPUs over gloo"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return f"{len(names)} CUDA devices: {', '.join(sorted(set(names)))}"


def _existing(folder: Path) -> Path:
    return next(place for place in (folder, *folder.parents) if place.exists())


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
