"""What storing frozen blocks as 8-bit integers saves and costs: SmolLM2-135M, the demo's LoRA and batches, one process.

Each way of storing runs in a process of its own of one thread; the peak is that of the resident set (VmHWM) above what
the process held after its imports. The loss is that of the first batches before anything is trained.
"""

import gc
import json
import statistics
import sys
import time
from typing import Any

import torch

from benchmarks.batches import batches_of, recipe_of
from benchmarks.machine import forget_peak, measured_apart, resident_bytes, write_report
from hyperscale.engine.collective import SingleProcess
from hyperscale.engine.host_memory import map_large_tensors
from hyperscale.model.backbone import open_backbone
from hyperscale.run.worker import build_engine

WAYS = ("none", "int8")
DTYPES = ("bfloat16", "float32")
STEPS, WARM_UP_STEPS = 8, 2
MIB = 2**20


def measure(dtype: str, quantization: str) -> dict[str, Any]:
    """Run a few steps at a learning rate that moves nothing; return bytes, seconds and losses."""
    torch.set_num_threads(1)
    map_large_tensors()
    changes = (f"backbone.quantization={quantization}", "engine.kind=local", "training.optimizer.learning_rate=1e-30")
    recipe = recipe_of(dtype, 1, *changes)
    steps = batches_of(recipe, 0, STEPS)
    gc.collect()
    before = resident_bytes("VmRSS")
    forget_peak()
    engine = build_engine(recipe, open_backbone(recipe.backbone), SingleProcess(), torch.device("cpu"), 7)
    held = sum(one.nbytes for one in engine.model.backbone.parameters())
    seconds, losses = [], []
    for number, batches in enumerate(steps):
        start = time.process_time()
        losses.append(engine.train_step(batches, number).loss)
        seconds.append(time.process_time() - start)
    return {
        "held": held,
        "peak": resident_bytes("VmHWM") - before,
        "seconds": statistics.median(seconds[WARM_UP_STEPS:]),
        "loss": statistics.fmean(losses),
    }


def table(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Return the Markdown table."""
    lines = [
        "| dtype | stored as | backbone MiB | peak MiB | processor s a step | loss |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for dtype, ways in results.items():
        for way, result in ways.items():
            sizes = " | ".join(f"{result[key] / MIB:.0f}" for key in ("held", "peak"))
            name = dtype if way == "none" else way
            lines.append(f"| {dtype} | {name} | {sizes} | {result['seconds']:.2f} | {result['loss']:.4f} |")
    return "\n".join(lines)


def main() -> None:
    """Run every way in a process; with a dtype and a way, be that process."""
    if len(sys.argv) == 3:
        print(json.dumps(measure(*sys.argv[1:])))
        return
    results = {dtype: {way: measured_apart("benchmarks.quantized", dtype, way) for way in WAYS} for dtype in DTYPES}
    print(table(results))
    write_report("quantized", {"benchmark": "quantized", "results": results})


if __name__ == "__main__":
    main()
