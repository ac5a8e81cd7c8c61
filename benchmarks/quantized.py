"""What storing frozen blocks in 8 or 4 bits saves and costs: SmolLM2-135M, the demo's LoRA and batches, one process.

Each way of storing runs in a process of its own of one thread; the peak is that of the resident set (VmHWM) above what
the process held after its imports. The loss is that of the first batches before anything is trained, and that of all
tokens of their texts. The packaged weights were 4-bit integers once (Q4_1, in blocks of 32): nf4 and int4 round again.
"""

import gc
import json
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.batches import batches_of, recipe_of
from benchmarks.machine import forget_peak, measured_apart, resident_bytes, write_report
from hyperscale.data.collate import Batch
from hyperscale.engine.collective import SingleProcess
from hyperscale.engine.host_memory import map_large_tensors
from hyperscale.model.backbone import open_backbone
from hyperscale.run.worker import build_engine

WAYS = ("none", "int8", "nf4", "nf4_all", "int4")
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
        "text_loss": text_loss(engine.model.backbone, [batch for batches in steps for batch in batches]),
    }


@torch.no_grad()
def text_loss(backbone: torch.nn.Module, batches: Sequence[Batch]) -> float:
    """Return the mean loss of the tokens of all rows, prompts too, each from the tokens before it."""
    total, count = 0.0, 0
    for batch in batches:
        logits = backbone(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1]
        is_real = batch.attention_mask[:, 1:].bool() & batch.attention_mask[:, :-1].bool()
        losses = torch.nn.functional.cross_entropy(logits[is_real].float(), batch.input_ids[:, 1:][is_real])
        total, count = total + losses.item() * int(is_real.sum()), count + int(is_real.sum())
    return total / count


def table(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Return the Markdown table."""
    lines = [
        "| dtype | stored as | backbone MiB | peak MiB | processor s a step | loss | loss of the texts |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for dtype, ways in results.items():
        for way, result in ways.items():
            sizes = " | ".join(f"{result[key] / MIB:.0f}" for key in ("held", "peak"))
            name = dtype if way == "none" else way
            losses = " | ".join(f"{result[key]:.4f}" for key in ("loss", "text_loss"))
            lines.append(f"| {dtype} | {name} | {sizes} | {result['seconds']:.2f} | {losses} |")
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
