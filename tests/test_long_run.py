"""The runner of the long cases: order, deadline, history, exit status."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests import long_run

CASES = """
import pytest

@pytest.mark.long
def test_good(): pass

@pytest.mark.long
def test_bad(): assert 1 + 1 == 3

def test_short(): raise AssertionError("not marked long")
"""


HANGING = """
import time
import pytest

@pytest.mark.long
def test_hangs(): time.sleep(600)
"""


def run(folder: Path, minutes: float) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HYPERSCALE_CACHE": str(folder / "cache"), "HYPERSCALE_LONG_MINUTES": str(minutes)}
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = long\n")
    command = [sys.executable, long_run.__file__]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_longest_waiting_first() -> None:
    cases = ["a", "b", "c", "d"]
    assert long_run.order(cases, {"a": 30.0, "b": 10.0, "c": 20.0, "d": 5.0}, "x") == ["d", "b", "c", "a"]
    never_run = [tuple(long_run.order(cases, {"d": 5.0}, salt)) for salt in "0123456789"]
    assert {order[-1] for order in never_run} == {"d"}
    assert len({order[0] for order in never_run}) == 3, "without a history, the commit decides"


def test_runs_the_marked_cases_and_remembers_them(tmp_path: Path) -> None:
    (tmp_path / "test_cases.py").write_text(CASES)
    result = run(tmp_path, 5)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "1 failed, 1 passed in" in result.stdout.splitlines()[-1]
    assert any(line.startswith("FAILED") and "test_bad" in line for line in result.stdout.splitlines()[-3:])
    assert "test_short" not in result.stdout
    history = json.loads((tmp_path / "cache/long_run.json").read_text())
    assert sorted(name.rpartition("::")[2] for name in history) == ["test_bad", "test_good"]

    late = run(tmp_path, 0)
    assert late.returncode == 0
    assert late.stdout.count("not reached: ") == 2
    assert json.loads((tmp_path / "cache/long_run.json").read_text()) == history

    (tmp_path / "test_cases.py").write_text(CASES.replace("@pytest.mark.long", ""))
    assert run(tmp_path, 5).returncode == 0


def test_a_case_that_fills_the_whole_time_alone_has_failed(tmp_path: Path) -> None:
    (tmp_path / "test_cases.py").write_text(
        "import time, pytest\n@pytest.mark.long\ndef test_hangs(): time.sleep(600)\n"
    )
    result = run(tmp_path, 0.1)
    assert result.returncode == 1
    assert "1 failed" in result.stdout.splitlines()[-1]
