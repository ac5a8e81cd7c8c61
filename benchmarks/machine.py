"""Provenance of every result: hardware and versions."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from hyperscale.tracking.provenance import package_versions


def provenance() -> dict[str, Any]:
    """Return the hardware and the versions."""
    fields = [line.partition(":") for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()]
    name = next((value.strip() for key, _, value in fields if key.strip() == "model name"), "unknown")
    machine = {
        "processor": name,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_average": round(os.getloadavg()[0], 1),
    }
    return {"machine": machine, "versions": {**package_versions(), "accelerate": version("accelerate")}}


def write_report(name: str, results: Mapping[str, Any]) -> None:
    """Write the figures of a benchmark as JSON into the folder `HYPERSCALE_BENCH_OUTPUT`, if that is set."""
    folder = os.environ.get("HYPERSCALE_BENCH_OUTPUT")
    if folder:
        path = Path(folder) / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**results, **provenance()}, indent=2) + "\n", encoding="utf-8")


def resident_bytes(key: Literal["VmRSS", "VmHWM"]) -> int:
    """Return this process's resident set, now or at its highest since `forget_peak`."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def forget_peak() -> None:
    """Reset the peak of the resident set."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def measured_apart(module: str, *words: str) -> dict[str, Any]:
    """Run a module in a process of its own, whose peak is then no other's; return the JSON of its last line."""
    command = [sys.executable, "-W", "ignore", "-m", module, *words]
    answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    figures: dict[str, Any] = json.loads(answer.splitlines()[-1])
    return figures
