"""Measurements that need a GPU: bf16 on a CUDA device, stage by stage, each within minutes.

    python -m benchmarks.gpu --stage step-llama-8b --output results

Every case runs in a process of its own and is written to OUTPUT/STAGE.json as soon as it is done; given again, a stage
runs only the cases that are missing. `--small` runs the same code at toy sizes, on CPUs too. One GPU gathers nothing:
what it shows is numerics, kernels, memory and speed, not sharding. The stage `gathers` therefore tries two processes on
the one device over gloo.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import provenance

Case = dict[str, Any]
CASE_SECONDS = 420
SEQUENCES = (512, 2048)
STEPS = {"step-llama-1b": "llama-1b", "step-llama-8b": "llama-8b", "step-t5-3b": "t5-3b"}
ROWS = {512: 16, 2048: 4}
"""Rows of a micro-batch by their length: about as many tokens in each."""


def cases_of(stage: str, small: bool) -> dict[str, Case]:
    """Return a stage's cases by name; a case is what benchmarks.gpu_case is asked to run."""
    if stage == "matmul":
        return {"bfloat16": {"run": "matmul", "size": 512 if small else 8192}}
    if stage == "correctness":
        return {
            f"{family} {kind}": {"run": "losses", "model": f"{family}-tiny", "engine": kind, "rows": 8, "length": 64}
            for family in ("llama", "t5")
            for kind in ("local", "zero")
        }
    if stage == "gathers":
        return {
            f"{family} on two processes": {
                "run": "losses",
                "model": f"{family}-tiny",
                "engine": "zero",
                "rows": 4,
                "length": 64,
                "processes": 2,
                "backend": "gloo",
            }
            for family in ("llama", "t5")
        }
    if stage == "load":
        model = "llama-tiny" if small else "llama-8b"
        return {side: {"run": "load", "model": model, "engine": side} for side in ("zero", "peft")}
    model = f"{STEPS[stage].split('-')[0]}-tiny" if small else STEPS[stage]
    cases: dict[str, Case] = {}
    for length in (32, 64) if small else SEQUENCES:
        for side in ("zero", "local", "peft"):
            for checkpointing in (False, True):
                if side == "local" and checkpointing:
                    continue
                name = f"{side} {length}" + (" checkpointed" if checkpointing else "")
                rows = 4 if small else ROWS[length]
                cases[name] = {"run": "step", "model": model, "engine": side, "rows": rows, "length": length}
                cases[name]["checkpointing"] = checkpointing
    return cases


def run_case(case: Case, scratch: Path) -> Case:
    """Run a case in a process of its own (or two); an end without an answer is an answer too."""
    answer = scratch / "answer.json"
    answer.unlink(missing_ok=True)
    processes = case.get("processes", 1)
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    command = [sys.executable, *launch, "-m", "benchmarks.gpu_case", json.dumps(case), str(scratch), str(answer)]
    start = time.monotonic()
    try:
        ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=CASE_SECONDS)
        last_lines = (ended.stderr or ended.stdout).strip().splitlines()[-3:]
    except subprocess.TimeoutExpired:
        last_lines = [f"not done after {CASE_SECONDS} s"]
    if answer.exists():
        figures: Case = json.loads(answer.read_text(encoding="utf-8"))
    else:
        figures = {"failed": " / ".join(last_lines)}
    return {**case, **figures, "wall_seconds": round(time.monotonic() - start, 1)}


def run_stage(stage: str, output: Path, scratch: Path, small: bool, only: str = "") -> dict[str, Case]:
    """Run the cases of a stage that OUTPUT does not hold yet, of those with `only` in their name."""
    file = output / f"{stage}.json"
    report: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"cases": {}}
    for name, case in cases_of(stage, small).items():
        if name in report["cases"] or only not in name:
            continue
        print(f"{stage}: {name}", flush=True)
        report["cases"][name] = run_case(case, scratch)
        report |= {"stage": stage, "small": small, "device": device_name(), **provenance()}
        output.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    cases: dict[str, Case] = report["cases"]
    return cases


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def table(stage: str, cases: Mapping[str, Case]) -> str:
    """Return a stage's figures as Markdown."""
    columns = list(dict.fromkeys(key for case in cases.values() for key in case if key not in _SETTINGS))
    lines = [f"## {stage}", "", "| case | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    for name, case in cases.items():
        lines.append(f"| {name} | " + " | ".join(_cell(case.get(column)) for column in columns) + " |")
    return "\n".join(lines) + "\n"


_SETTINGS = ("run", "model", "engine", "rows", "length", "processes", "backend", "checkpointing", "size")


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def main() -> int:
    """Run one stage, or all; returns 1 if a case failed."""
    stages = ("matmul", "correctness", "gathers", "load", *STEPS)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--stage", choices=stages, action="append", help="may be repeated (default: all)")
    parser.add_argument("--output", type=Path, required=True, help="folder of the JSON files")
    parser.add_argument("--scratch", type=Path, help="folder for random weights, 20 GB (default: a temporary one)")
    parser.add_argument("--small", action="store_true", help="toy sizes, to try the script itself")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases with TEXT in their name, such as 2048")
    options = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    failed = 0
    with tempfile.TemporaryDirectory(prefix="hyperscale-gpu-") as temporary:
        scratch = options.scratch or Path(temporary)
        scratch.mkdir(parents=True, exist_ok=True)
        for stage in options.stage or stages:
            cases = run_stage(stage, options.output, scratch, options.small, options.only)
            print(table(stage, cases))
            failed += sum("failed" in case for case in cases.values())
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
