"""The versions of the code that a run used."""

import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PACKAGES = ("hypernet-scale", "torch", "transformers", "deepspeed", "ray", "mlflow", "peft", "safetensors")


def git_commit(folder: Path) -> str | None:
    """Return the commit checked out in `folder`, with `-dirty` if tracked files differ; None outside git."""
    command = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    try:
        described = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return described.stdout.strip() or None if described.returncode == 0 else None


def package_versions() -> dict[str, str]:
    """Return the versions of the installed packages that a run's numbers depend on."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
