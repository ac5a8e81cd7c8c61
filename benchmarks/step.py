"""What sharding costs a training step: ZeRO-3 with nothing and with everything resident, against the unsharded engine.

SmolLM2-135M, LoRA r = 8 on q and v from the hypernetwork, 2 gloo ranks of one thread, the same samples for all engines.
The variants take turns, so that whatever else the machine does falls on all of them alike.
"""

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoTokenizer

from hyperscale.config.loading import load_recipe
from hyperscale.config.run import Recipe
from hyperscale.data.collate import Batch
from hyperscale.data.corpus import load_corpus
from hyperscale.data.loader import TrainLoader
from hyperscale.engine.base import Engine
from hyperscale.engine.collective import TorchCollective
from hyperscale.launch.worker import build_engine
from hyperscale.model.backbone import open_backbone
from hyperscale.tracking.provenance import package_versions

RANKS = 2
ROUNDS = 7
VARIANTS = {
    "local (unsharded)": ["engine.kind=local"],
    "zero, resident none": ["engine.kind=zero", "engine.resident=none"],
    "zero, resident all": ["engine.kind=zero", "engine.resident=all"],
}
FLOOR = "local (unsharded)"


def recipe_of(variant: str, dtype: str) -> Recipe:
    """Return the demo's recipe with a variant's engine."""
    overrides = [
        f"cluster.workers={RANKS}",
        f"backbone.dtype={dtype}",
        "tracking.mlflow.enabled=false",
        *VARIANTS[variant],
    ]
    return load_recipe("demo", overrides)


def batches_of(recipe: Recipe, rank: int) -> list[list[Batch]]:
    """Return this rank's micro-batches of the first `ROUNDS` + 1 steps."""
    folder = open_backbone(recipe.backbone)
    corpus = load_corpus(
        recipe.data, AutoTokenizer.from_pretrained(folder.path), folder.architecture.is_encoder_decoder
    )
    training, layout = recipe.training, corpus.layout
    loader = TrainLoader(
        [loaded.train.encoded for loaded in corpus.tasks],
        recipe.data,
        training.batch_size,
        training.micro_batch_size,
        rank,
        RANKS,
        recipe.seed,
        layout.pad_token_id,
        layout.is_encoder_decoder,
    )
    return [loader.next_step() for _ in range(ROUNDS + 1)]


def measure(dtype: str, device: torch.device) -> dict[str, list[float]]:
    """Return the seconds of each timed step of each variant, on this rank; the first step of each is not counted."""
    collective = TorchCollective(device)
    engines: dict[str, Engine] = {}
    for variant in VARIANTS:
        recipe = recipe_of(variant, dtype)
        engines[variant] = build_engine(
            recipe, open_backbone(recipe.backbone), collective, device, len(recipe.data.tasks)
        )
    steps = batches_of(recipe_of(FLOOR, dtype), collective.rank)
    seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for number, batches in enumerate(steps):
        for variant, engine in engines.items():
            collective.barrier()
            start = time.perf_counter()
            engine.train_step(batches, number)
            if number:
                seconds[variant].append(time.perf_counter() - start)
    return seconds


def table(results: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Return the medians and their ratios to the floor, as text."""
    lines = [f"{'dtype':<10} {'engine':<22} {'median s':>9} {'x floor':>8}"]
    for dtype, variants in results.items():
        floor = statistics.median(variants[FLOOR])
        for variant, seconds in variants.items():
            median = statistics.median(seconds)
            lines.append(f"{dtype:<10} {variant:<22} {median:>9.2f} {median / floor:>8.2f}")
    return "\n".join(lines)


def main() -> None:
    """Measure on all ranks; rank 0 prints the table and, with a path as argument, writes the JSON."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results = {dtype: measure(dtype, torch.device("cpu")) for dtype in ("bfloat16", "float32")}
    if dist.get_rank() == 0:
        print(table(results))
        machine = {"processor": platform.processor() or platform.machine(), "cores": len(os.sched_getaffinity(0))}
        report = {"results": results, "ranks": RANKS, "machine": machine, "versions": package_versions()}
        if len(sys.argv) > 1:
            Path(sys.argv[1]).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
