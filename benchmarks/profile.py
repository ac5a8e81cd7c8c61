"""Where a step's time goes, and how much of it is the floor: the frozen backbone's matrix products alone.

SmolLM2-135M, the demo's LoRA, hypernetwork and first batches, unsharded in one process of one thread. A frozen model
needs two products a weight, forward and gradient of the input: 4 · N · T operations for N weights and T tokens. The
floor runs these two products with every weight at the batch's padded size, the head's at the label positions alone;
steps and floor take turns.
"""

import statistics
import time
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from benchmarks.batches import batches_of, recipe_of
from benchmarks.machine import write_report
from hyperscale.data.collate import IGNORED, Batch
from hyperscale.engine.collective import SingleProcess
from hyperscale.model.backbone import open_backbone
from hyperscale.run.worker import build_engine

ROUNDS = 7
WARM_UP_STEPS = 2
SHOWN = 12
DTYPES = ("bfloat16", "float32")


def measure(dtype: str) -> dict[str, Any]:
    """Return processor seconds of steps and of their floors, the rate of the products, and operators by their share."""
    recipe, device = recipe_of(dtype, 1, "engine.kind=local", "training.batch_size=8"), torch.device("cpu")
    engine = build_engine(recipe, open_backbone(recipe.backbone), SingleProcess(), device, 7)
    batches = [step[0] for step in batches_of(recipe, 0, WARM_UP_STEPS + ROUNDS)]
    head: Any = engine.model.backbone.get_output_embeddings()  # type: ignore[operator]
    linears = [one for one in engine.model.backbone.modules() if isinstance(one, nn.Linear)]
    steps, floors, rates = [], [], []
    for number, batch in enumerate(batches):
        start = time.process_time()
        engine.train_step([batch], number)
        step = time.process_time() - start
        start = time.process_time()
        operations = sum(both_products(one, tokens_at(one is head, batch)) for one in linears)
        floor = time.process_time() - start
        if number >= WARM_UP_STEPS:
            steps.append(step)
            floors.append(floor)
            rates.append(operations / floor / 1e9)
    with profile(activities=[ProfilerActivity.CPU]) as watched:
        for number, batch in enumerate(batches[WARM_UP_STEPS:]):
            engine.train_step([batch], number)
    events = sorted(watched.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    shares = {event.key: event.self_cpu_time_total / total for event in events[:SHOWN]}
    return {"steps": steps, "floors": floors, "gflops": rates, "shares": shares}


def tokens_at(is_head: bool, batch: Batch) -> int:
    """Return the rows that go through a layer."""
    return int(batch.labels.ne(IGNORED).sum()) if is_head else batch.input_ids.numel()


def both_products(linear: nn.Linear, tokens: int) -> int:
    """Run a layer's product and its input's gradient's; return the operations."""
    weight = linear.weight.detach()
    x = torch.ones(tokens, linear.in_features, dtype=weight.dtype)
    F.linear(x, weight) @ weight
    return 4 * tokens * weight.numel()


def table(results: dict[str, dict[str, Any]]) -> str:
    """Return the floor's share and the operators' as text."""
    lines = []
    for dtype, result in results.items():
        share = statistics.median(floor / step for floor, step in zip(result["floors"], result["steps"], strict=True))
        step, floor, rate = (statistics.median(result[key]) for key in ("steps", "floors", "gflops"))
        lines.append(f"{dtype}: step {step:.3f} cpu s, floor {floor:.3f} cpu s ({rate:.0f} GFLOP/s): {share:.0%}")
        lines += [f"  {part:>6.1%}  {name}" for name, part in result["shares"].items()]
    return "\n".join(lines)


def main() -> None:
    """Measure both dtypes."""
    torch.set_num_threads(1)
    results = {dtype: measure(dtype) for dtype in DTYPES}
    print(table(results))
    write_report("profile", {"benchmark": "profile", "results": results})


if __name__ == "__main__":
    main()
