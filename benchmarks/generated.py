"""What making weights at every site saves, and costs, where the weights of a step are large.

A LLaMA of 110M parameters and random weights, bottlenecks of a quarter of its width at every sub-layer from one
hypernetwork, 16 rows of as many tasks, activation checkpointing, one process of one thread. The two ways run in a
process each; the peak is that of the resident set (VmHWM) above what the process held after its imports.
"""

import dataclasses
import gc
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import forget_peak, measured_apart, resident_bytes, write_report
from benchmarks.memory import CPU, MIB, ROWS, longest_batch, make_backbone
from hyperscale.config.run import Recipe
from hyperscale.engine.collective import SingleProcess
from hyperscale.engine.host_memory import map_large_tensors
from hyperscale.model.backbone import open_backbone
from hyperscale.planning.memory import Sharding, describe_run, plan_memory
from hyperscale.run.worker import build_engine

WAYS = {"all sites at once": "64GiB", "site by site": "0B"}
STEPS = 4


def recipe_of(budget: str, backbone: Path) -> Recipe:
    """Return the recipe of a way."""
    return Recipe.model_validate(
        {
            "name": "generated",
            "output": str(backbone.parent / "run"),
            "backbone": {"name": str(backbone), "dtype": "bfloat16"},
            "adaptation": {"adapters": [{"kind": "bottleneck", "reduction": 4}]},
            "data": {
                "tasks": [f"task_{number}" for number in range(ROWS)],
                "max_source_tokens": 48,
                "max_target_tokens": 16,
            },
            "training": {"steps": 100, "batch_size": ROWS, "micro_batch_size": ROWS},
            "engine": {"kind": "local", "activation_checkpointing": True, "generated_budget": budget},
            "cluster": {"workers": 1},
            "tracking": {"mlflow": {"enabled": False}},
        }
    )


def measure(way: str, backbone: Path) -> dict[str, Any]:
    """Run a few steps in this process; returns bytes, seconds and the losses."""
    torch.set_num_threads(1)
    map_large_tensors()
    recipe = recipe_of(WAYS[way], backbone)
    gc.collect()
    before = resident_bytes("VmRSS")
    forget_peak()
    folder = open_backbone(recipe.backbone)
    engine = build_engine(recipe, folder, SingleProcess(), CPU, ROWS)
    torch.manual_seed(0)
    batch = dataclasses.replace(longest_batch(is_encoder_decoder=False), task_index=torch.arange(ROWS))
    seconds, losses = [], []
    for step in range(STEPS):
        start = time.process_time()
        losses.append(engine.train_step([batch], step).loss)
        seconds.append(time.process_time() - start)
    plan = plan_memory(describe_run(recipe, folder), Sharding(1), frozenset(), "cpu")
    return {
        "peak": resident_bytes("VmHWM") - before,
        "predicted": plan.total,
        "generated": plan.items["generated weights"],
        "seconds": statistics.median(seconds[1:]),
        "losses": losses,
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    """Return the Markdown table."""
    lines = [
        "| way | generated MiB | peak MiB | predicted MiB | processor s a step | last loss |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for way, result in results.items():
        sizes = " | ".join(f"{result[key] / MIB:,.0f}" for key in ("generated", "peak", "predicted"))
        lines.append(f"| {way} | {sizes} | {result['seconds']:.2f} | {result['losses'][-1]:.4f} |")
    return "\n".join(lines)


def main() -> None:
    """Run both ways, each in a process of its own; with a way and a backbone, be that process."""
    if len(sys.argv) == 3:
        print(json.dumps(measure(sys.argv[1], Path(sys.argv[2]))))
        return
    results = {}
    with tempfile.TemporaryDirectory(prefix="generated-") as scratch:
        backbone = make_backbone("llama-110m", "bfloat16", Path(scratch))
        for way in WAYS:
            results[way] = measured_apart("benchmarks.generated", way, str(backbone))
    print(table(results))
    write_report("generated", {"benchmark": "generated", "results": results})


if __name__ == "__main__":
    main()
