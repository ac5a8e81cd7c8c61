"""What mixing tasks costs: a step of eight tasks against one of a single task, and 1,024 known tasks against eight.

SmolLM2-135M, the demo's LoRA and hypernetwork, unsharded in one process of one thread; 8 samples of the same token ids
in every row, only their tasks differ. The rows take turns.
"""

import dataclasses
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.batches import batches_of, recipe_of
from benchmarks.machine import write_report
from hyperscale.data.collate import Batch
from hyperscale.engine.base import Engine
from hyperscale.engine.collective import SingleProcess
from hyperscale.model.backbone import open_backbone
from hyperscale.model.weights import as_leaves, backward, tensors_of
from hyperscale.run.worker import build_engine

ROUNDS = 9
WARM_UP_STEPS = 2
ROWS = {
    # row -> known tasks, tasks in the batch
    "1 task of 8": (8, 1),
    "8 tasks of 8": (8, 8),
    "8 tasks of 1,024": (1024, 8),
}
DTYPES = ("bfloat16", "float32")


def measure(dtype: str) -> dict[str, Any]:
    """Return the seconds of each row's steps and of generating, and how far a mixed batch is from single tasks."""
    recipe, device = recipe_of(dtype, 1, "engine.kind=local", "training.batch_size=8"), torch.device("cpu")
    folder = open_backbone(recipe.backbone)
    engines: dict[int, Engine] = {
        known: build_engine(recipe, folder, SingleProcess(), device, known)
        for known in {known for known, _ in ROWS.values()}
    }
    gradients = [torch.ones_like(tensor) for tensor in tensors_of(engines[8].model.generator(torch.arange(8)))]
    steps = [batches[0] for batches in batches_of(recipe, 0, WARM_UP_STEPS + ROUNDS)]
    figures: dict[str, Any] = {row: {"seconds": [], "processor": []} for row in ROWS}
    figures["generation"] = {"seconds": [], "processor": []}
    for number, batch in enumerate(steps):
        for row, (known, mixed) in ROWS.items():
            of_tasks = with_tasks(batch, mixed)
            _timed(figures[row], number, lambda: engines[known].train_step([of_tasks], number))  # noqa: B023 (called here)
        _timed(figures["generation"], number, lambda: generate(engines[8], gradients))
    figures["difference"] = difference(engines[8], steps[0])
    return figures


def with_tasks(batch: Batch, mixed: int) -> Batch:
    """Return the batch with its samples dealt out to tasks 0 … mixed - 1."""
    return dataclasses.replace(batch, task_index=torch.arange(len(batch.task_index)) % mixed)


def generate(engine: Engine, gradients: Sequence[Tensor]) -> None:
    """Make the weights of eight tasks and send gradients back: all that a step generates."""
    weights = engine.model.generator(torch.arange(8))
    leaves = as_leaves(weights)
    for leaf, gradient in zip(tensors_of(leaves), gradients, strict=True):
        leaf.grad = gradient
    backward(weights, leaves)
    engine.model.generator.zero_grad()  # type: ignore[attr-defined]


def difference(engine: Engine, batch: Batch) -> float:
    """Return the largest difference between a sample's logits in a mixed batch and in one of its task alone.

    Relative to the largest logit; the steps before have moved the tasks apart.
    """
    model, inputs = engine.model, {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    tasks = torch.arange(len(batch.task_index)) % 8
    real = batch.attention_mask.bool()
    worst = 0.0
    with torch.no_grad():
        with model.adapting(tasks):
            mixed = model.backbone(**inputs, use_cache=False).logits.float()
        for row, task in enumerate(tasks.tolist()):
            with model.adapting(torch.tensor([task])):
                alone = model.backbone(**inputs, use_cache=False).logits[row].float()
            worst = max(worst, float((mixed[row] - alone)[real[row]].abs().max() / mixed[real].abs().max()))
    return worst


def _timed(figures: dict[str, list[float]], number: int, run: Any) -> None:
    start, processor = time.perf_counter(), time.process_time()
    run()
    if number >= WARM_UP_STEPS:
        figures["seconds"].append(time.perf_counter() - start)
        figures["processor"].append(time.process_time() - processor)


def table(results: dict[str, dict[str, Any]]) -> str:
    """Return medians and ratios as text."""
    lines = [f"{'dtype':<9} {'row':<18} {'step s':>7} {'cpu s':>7} {'x (cpu)':>8}"]
    for dtype, rows in results.items():
        one, eight, many = (rows[row]["processor"] for row in ROWS)
        against = {"8 tasks of 8": (eight, one), "8 tasks of 1,024": (many, eight)}
        against["generation"] = (rows["generation"]["processor"], eight)
        for row in (*ROWS, "generation"):
            seconds, processor = (statistics.median(rows[row][key]) for key in ("seconds", "processor"))
            quotient = ""
            if row in against:
                quotient = f"{statistics.median(a / b for a, b in zip(*against[row], strict=True)):.3f}"
            lines.append(f"{dtype:<9} {row:<18} {seconds:>7.3f} {processor:>7.3f} {quotient:>8}")
        lines.append(f"{dtype:<9} largest difference from a batch of one task, relative: {rows['difference']:.1e}")
    lines.append("goals: 8 tasks over 1 task 1.10, 1,024 known over 8 known 1.02, generation over the step 0.03")
    return "\n".join(lines)


def main() -> None:
    """Measure both dtypes."""
    torch.set_num_threads(1)
    results = {dtype: measure(dtype) for dtype in DTYPES}
    print(table(results))
    write_report("mixture", {"benchmark": "mixture", "results": results})


if __name__ == "__main__":
    main()
