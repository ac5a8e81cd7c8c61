"""Loading a sharded backbone: host memory, bytes read and time, against transformers' `from_pretrained` under ZeRO-3.

A LLaMA of 1.1B parameters in bf16 (TinyLlama's shape, random weights), in five files with an index, on 2 and 4 gloo
ranks. Every load runs in processes of its own, after the files have been read once, so that the page cache is warm for
all alike. `ours` is `hyperscale.engine.zero.shard_backbone` as the worker calls it.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from benchmarks.machine import write_report
from benchmarks.shapes import LLAMA_1B
from hyperscale.config.run import Recipe
from hyperscale.model.backbone import open_backbone

RANKS = (2, 4)
WAYS = ("ours", "from_pretrained")
MIB = 2**20


def make_backbone(folder: Path) -> None:
    """Save the model, with random weights."""
    config = LlamaConfig(**LLAMA_1B, dtype="bfloat16")
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig.from_model_config(config)
    model.save_pretrained(folder, max_shard_size="500MB")


@contextmanager
def _measured(figures: dict[str, float]) -> Iterator[None]:
    """Measure the growth of the resident memory at its highest, bytes read and seconds inside the `with`."""
    before, read, start = _resident(), _bytes_read(), time.perf_counter()
    highest, done = [before], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            highest[0] = max(highest[0], _resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    yield
    figures["seconds"] = time.perf_counter() - start
    done.set()
    watcher.join()
    figures["read_mib"] = (_bytes_read() - read) / MIB
    figures["peak_mib"] = (max(highest[0], _resident()) - before) / MIB


def _resident() -> int:
    """Return this process's resident bytes; a file's pages that it maps count, as a container's limit counts them."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _bytes_read() -> int:
    return int(Path("/proc/self/io").read_text(encoding="ascii").split()[1])


def load(way: str, folder: str) -> None:
    """Load on this rank; rank 0 prints everybody's figures as JSON."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    import deepspeed  # noqa: PLC0415 (both ways have it before they are measured)

    from hyperscale.engine.zero import shard_backbone  # noqa: PLC0415

    recipe = _recipe(folder, ranks)
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    figures: dict[str, float] = {}
    dist.barrier()
    if way == "ours":
        opened = open_backbone(recipe.backbone)
        with _measured(figures):
            module, _ = shard_backbone(
                opened, recipe.backbone, recipe.engine, recipe.training, torch.device("cpu"), ranks
            )
    else:
        from transformers.integrations import HfDeepSpeedConfig  # noqa: PLC0415

        config = {
            "train_micro_batch_size_per_gpu": 1,
            "bf16": {"enabled": True},
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        }
        kept = HfDeepSpeedConfig(config)  # transformers looks for it through a weak reference
        with _measured(figures):
            module = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).requires_grad_(False)
            deepspeed.initialize(model=module, config=config)
        del kept
    parameters: list[Any] = list(module.parameters())
    figures["share_mib"] = sum(one.ds_tensor.numel() * one.ds_tensor.element_size() for one in parameters) / MIB
    everyone: list[Any] = [None] * ranks
    dist.all_gather_object(everyone, figures)
    if rank == 0:
        print("RESULT " + json.dumps(everyone), flush=True)
    dist.destroy_process_group()


def _recipe(folder: str, ranks: int) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "load",
            "output": "/nowhere",
            "backbone": {"name": folder, "dtype": "bfloat16"},
            "data": {"tasks": ["none"]},
            "training": {"steps": 100, "batch_size": ranks, "micro_batch_size": 1},
            "engine": {"kind": "zero", "resident": "none"},
            "cluster": {"workers": ranks},
        }
    )


def _run(way: str, folder: Path, ranks: int) -> list[dict[str, float]]:
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as stream:
            while stream.read(16 * MIB):
                pass
    command = ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m", "benchmarks.load"]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *command, way, str(folder)], env=environment, capture_output=True, text=True, check=False
    )
    line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
    if line is None:
        raise SystemExit(f"benchmarks.load: {way} on {ranks} ranks failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    figures: list[dict[str, float]] = json.loads(line.removeprefix("RESULT "))
    return figures


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """Return a line a way and number of ranks: the worst rank's figures."""
    lines = [f"{'way':<18} {'ranks':>5} {'share MiB':>10} {'peak MiB':>10} {'read/share':>10} {'seconds':>8}"]
    for name, ranks in results.items():
        way, number = name.split(" x ")
        share, peak = (max(one[key] for one in ranks) for key in ("share_mib", "peak_mib"))
        read, seconds = max(one["read_mib"] / one["share_mib"] for one in ranks), max(one["seconds"] for one in ranks)
        lines.append(f"{way:<18} {number:>5} {share:>10.0f} {peak:>10.0f} {read:>10.2f} {seconds:>8.1f}")
    return "\n".join(lines)


def main() -> None:
    """Measure all ways, or, with arguments, be one rank of a measurement."""
    if len(sys.argv) == 3:
        load(*sys.argv[1:])
        return
    with tempfile.TemporaryDirectory(prefix="hyperscale-load-") as scratch:
        folder = Path(scratch)
        subprocess.run(
            [sys.executable, "-c", f"from benchmarks.load import *; make_backbone(Path({scratch!r}))"], check=True
        )
        results = {f"{way} x {ranks}": _run(way, folder, ranks) for ranks in RANKS for way in WAYS}
    print(table(results))
    write_report("load", {"benchmark": "load", "results": results})


if __name__ == "__main__":
    main()
