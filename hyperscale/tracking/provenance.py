"""What code a run ran."""

import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PACKAGES = ("hypernet-scale", "torch", "transformers", "deepspeed", "ray", "mlflow", "peft", "safetensors")


def git_commit(folder: Path) -> str | None:
    """Return the commit that `folder` is a work tree of, with `-dirty` if tracked files differ; None outside git."""
    command = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return told.stdout.strip() or None if told.returncode == 0 else None


def package_versions() -> dict[str, str]:
    """Return the versions of the packages that a run's numbers depend on, as far as they are installed."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
