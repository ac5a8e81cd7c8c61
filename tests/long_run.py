"""Runs the cases marked `long` one by one until a deadline, those that ran longest ago first.

`make test-long` calls it in the root of the repository. The history lies in the cache folder, beside the assets, so
that it outlives a clone. Where no history is kept, the commit decides the order of the cases never run, so that none of
them is starved for ever.

A case cut off by the deadline goes first next time. A case cut off although it had the whole time has failed.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

PYTEST = (sys.executable, "-m", "pytest")


@dataclass
class Report:
    """What became of the cases."""

    passed: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    not_reached: list[str] = field(default_factory=list)


def order(cases: Sequence[str], last_run: Mapping[str, float], salt: str) -> list[str]:
    """Return `cases`: those that never ran first, in an order drawn from `salt`, then by the time of their last run."""

    def key(case: str) -> tuple[float, str]:
        return last_run.get(case, 0.0), hashlib.sha256(f"{salt}{case}".encode()).hexdigest()

    return sorted(cases, key=key)


def collect() -> list[str]:
    """Return the node ids of the cases marked `long`."""
    command = [*PYTEST, "--collect-only", "-q", "-m", "long", "--no-header", "-W", "ignore"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode not in (0, 5):  # 5: nothing was collected
        raise SystemExit(f"collecting the long cases failed:\n{result.stdout}{result.stderr}")
    return [line for line in result.stdout.splitlines() if "::" in line]


def run_case(case: str, seconds: float) -> int | None:
    """Run one case; return pytest's exit status, or None when `seconds` were over first."""
    process = subprocess.Popen([*PYTEST, "-m", "long", "--no-header", case], start_new_session=True)
    try:
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return None


def run_all(cases: Sequence[str], budget: float, history: Path) -> Report:
    """Run `cases` in their order for `budget` seconds, noting each finished one in `history`."""
    report, start = Report(), time.monotonic()
    for number, case in enumerate(cases):
        left = budget - (time.monotonic() - start)
        had_it_all = number == 0 and left > 0
        status = run_case(case, left) if left > 0 else None
        if status is None and not had_it_all:
            report.not_reached.append(case)
            continue
        if status is None:
            print(f"{case} did not end although it had all of the {budget / 60:g} minutes", flush=True)
        (report.passed if status == 0 else report.failed).append(case)
        note(history, case)
    return report


def read(history: Path) -> dict[str, float]:
    """Return when each case last ran, in seconds since the epoch; nothing where the history is missing or damaged."""
    try:
        return {str(case): float(when) for case, when in json.loads(history.read_text()).items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def note(history: Path, case: str) -> None:
    """Write down that `case` has just run."""
    history.parent.mkdir(parents=True, exist_ok=True)
    temporary = history.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(read(history) | {case: time.time()}, indent=1))
    temporary.replace(history)


def main() -> int:
    """Run what there is, print what was not reached, and return the exit status."""
    cases = collect()
    if not cases:
        print("no case is marked `long`: nothing to run")
        return 0
    cache = Path(os.environ.get("HYPERSCALE_CACHE", "~/.cache/hyperscale")).expanduser()
    history = cache / "long_run.json"
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout
    budget = 60 * float(os.environ.get("HYPERSCALE_LONG_MINUTES", "55"))
    start = time.monotonic()
    report = run_all(order(cases, read(history), commit), budget, history)
    for case in report.not_reached:
        print(f"not reached: {case}")
    for case in report.failed:
        print(f"FAILED {case}")
    counts = f"{len(report.failed)} failed, " * bool(report.failed) + f"{len(report.passed)} passed"
    counts += f", {len(report.not_reached)} not reached" * bool(report.not_reached)
    print(f"===== long cases: {counts} in {time.monotonic() - start:.2f}s =====")
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
