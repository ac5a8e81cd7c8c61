"""Checks the memory plan: the predicted peak of a rank's memory against the one that Linux counted.

Every configuration runs in a process group of its own: 2 gloo ranks of one thread, random weights, LoRA r = 8 on q and
v from the hypernetwork, two steps of the longest batch. The peak is that of the resident set (VmHWM) above what
the process held after its imports; the prediction is `hyperscale plan`'s, with no knowledge of the measurement.
"""

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from safetensors.torch import save_file

from benchmarks.machine import forget_peak, resident_bytes
from benchmarks.shapes import Q_AND_V
from hyperscale.config.run import Recipe
from hyperscale.data.collate import IGNORED, Batch
from hyperscale.engine.collective import TorchCollective
from hyperscale.engine.deepspeed_names import shard_of
from hyperscale.engine.ds_config import read_ds_config, read_sharding
from hyperscale.engine.zero import ZeroEngine
from hyperscale.model.architectures import architecture_of
from hyperscale.model.backbone import DTYPES, open_backbone
from hyperscale.planning.memory import MemoryPlan, describe_run, plan_memory
from hyperscale.run.worker import build_engine
from hyperscale.tracking.provenance import package_versions

RANKS = 2
STEPS = 2
MIB = 2**20
SHARDS = ("backbone shard", "second shard (hpZ)")
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    model: str
    dtype: str
    resident: str
    checkpointing: bool
    preset: str = "zero3"
    quantization: str = "none"
    shape: tuple[int, int, int] = (16, 48, 16)
    """Rows of a micro-batch, tokens of their prompts and of their answers."""
    generated_budget: str = "4GiB"


SHAPES: dict[str, dict[str, Any]] = {
    "llama-110m": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12},
    "llama-440m": {"hidden_size": 1280, "intermediate_size": 3456, "num_hidden_layers": 20, "num_attention_heads": 20},
    "qwen3-110m": {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "head_dim": 128,
    },
    "gemma2-110m": {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "sliding_window": 32,
    },
    "t5-220m": {"d_model": 768, "d_ff": 2048, "d_kv": 64, "num_layers": 12, "num_heads": 12},
    "t5-740m": {"d_model": 1024, "d_ff": 2816, "d_kv": 64, "num_layers": 24, "num_heads": 16},
}
EVERYTHING = "64GiB"
"""Room for every part. `all` keeps them too, but asks for speed: there the C library keeps what a step frees."""
CASES = (
    Case("llama-110m", "float32", "none", False),
    Case("llama-110m", "float32", EVERYTHING, False),
    Case("llama-110m", "float32", "none", True),
    Case("t5-220m", "float32", "none", False),
    Case("t5-220m", "float32", EVERYTHING, False),
    Case("t5-220m", "float32", "none", True),
    Case("llama-440m", "bfloat16", "none", False),
    Case("llama-440m", "bfloat16", EVERYTHING, False),
    Case("llama-440m", "bfloat16", "none", True),
    Case("llama-110m", "float32", "150MiB", False),
    Case("llama-110m", "float32", "none", False, "zero3_offload"),
    Case("llama-110m", "float32", "none", False, "zero3_hpz"),
    Case("t5-740m", "bfloat16", "none", True),
    Case("t5-740m", "bfloat16", EVERYTHING, False),
    Case("llama-110m", "float32", "all", False),
    Case("qwen3-110m", "float32", "none", False),
    Case("gemma2-110m", "float32", "none", False),
    Case("gemma2-110m", "bfloat16", EVERYTHING, False),
    Case("llama-440m", "bfloat16", "none", True, quantization="int8"),
    Case("llama-440m", "bfloat16", "none", True, quantization="nf4"),
    Case("llama-440m", "bfloat16", "none", True, quantization="nf4_all"),
    Case("llama-110m", "bfloat16", "none", True, "zero3", "nf4_all", (1, 1792, 256), "0B"),
)
SHORT = (0, 2, 3, 6, 12, 13)
"""Both families in two sizes, something of every option."""


def make_backbone(model: str, dtype: str, folder: Path) -> Path:
    """Save a model of random weights, tensor by tensor, as `save_pretrained` would name them."""
    model_type = model.partition("-")[0]
    fields: dict[str, Any] = {"vocab_size": 32000, "tie_word_embeddings": True}
    if model_type == "t5":
        fields = {"vocab_size": 32128, "feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0}
    config = transformers.CONFIG_MAPPING[model_type](**fields, **SHAPES[model])
    kind: Any = getattr(transformers, architecture_of(model_type).model_class)
    with torch.device("meta"):
        empty = kind(config)
    target = folder / f"{model}-{dtype}"
    config.save_pretrained(target)
    tensors = {name: 0.02 * torch.randn(one.shape, dtype=DTYPES[dtype]) for name, one in empty.named_parameters()}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def recipe_of(case: Case, backbone: Path) -> Recipe:
    """Return the recipe of a case; hpZ groups are as large as the run here."""
    ds_config = case.preset
    if case.preset == "zero3_hpz":
        raw = read_ds_config(case.preset)
        raw["zero_optimization"]["zero_hpz_partition_size"] = RANKS
        ds_config = str(backbone.parent / "hpz.json")
        Path(ds_config).write_text(json.dumps(raw), encoding="utf-8")
    rows, source, target = case.shape
    return Recipe.model_validate(
        {
            "name": "memory",
            "output": str(backbone.parent / "run"),
            "backbone": {"name": str(backbone), "dtype": case.dtype, "quantization": case.quantization},
            "adaptation": {"adapters": [Q_AND_V]},
            "data": {"tasks": ["first", "second"], "max_source_tokens": source, "max_target_tokens": target},
            "training": {"steps": 100, "batch_size": RANKS * rows, "micro_batch_size": rows},
            "engine": {
                "ds_config": ds_config,
                "resident": case.resident,
                "activation_checkpointing": case.checkpointing,
                "generated_budget": case.generated_budget,
            },
            "cluster": {"workers": RANKS},
            "tracking": {"mlflow": {"enabled": False}},
        }
    )


def longest_batch(shape: tuple[int, int, int], is_encoder_decoder: bool) -> Batch:
    """Return a micro-batch in which every row is as long as the recipe allows."""
    rows, source, target = shape
    length = source if is_encoder_decoder else source + target
    ids = torch.randint(3, 30000, (rows, length))
    answers = torch.randint(3, 30000, (rows, target))
    labels = answers if is_encoder_decoder else torch.full((rows, length), IGNORED)
    labels[:, -target:] = answers
    tasks = torch.arange(rows) % 2
    return Batch(ids, torch.ones_like(ids), labels, tasks, rows * (source + target))


def measure(case: Case, backbone: Path) -> dict[str, Any]:
    """Run a case on this rank; returns bytes: predicted, measured peak, and what is held between steps."""
    recipe = recipe_of(case, backbone)
    gc.collect()
    before = resident_bytes("VmRSS")
    forget_peak()
    folder = open_backbone(recipe.backbone)
    engine = build_engine(recipe, folder, TorchCollective(CPU), CPU, num_tasks=2)
    assert isinstance(engine, ZeroEngine)
    loaded, after_load = (resident_bytes(key) - before for key in ("VmHWM", "VmRSS"))
    shards = sum(shard_of(one).nbytes for one in engine.model.backbone.parameters())
    batch = longest_batch(case.shape, folder.architecture.is_encoder_decoder)
    for step in range(STEPS):
        engine.train_step([batch], step)
    measured = {
        "measured": resident_bytes("VmHWM") - before,
        "loading": loaded,
        "after_load": after_load,
        "shards": shards,
        "between_steps": resident_bytes("VmRSS") - before,
        "held_backbone": shards + gathered_bytes(engine.model.backbone),
    }
    workload = describe_run(recipe, folder)
    plan = plan_memory(workload, read_sharding(recipe.engine, RANKS, "cpu"), engine.resident, "cpu")
    offloaded = sum(plan.host.values())
    return measured | {
        "predicted": plan.total + offloaded,
        "predicted_shards": plan_shards(plan),
        "moment": plan.moment,
        "items": dict(plan.items),
    }


def plan_shards(plan: MemoryPlan) -> int:
    """Return the bytes of a rank's shards, on the device or offloaded."""
    return sum(items.get(name, 0) for items in (plan.items, plan.host) for name in SHARDS)


def gathered_bytes(backbone: torch.nn.Module) -> int:
    """Return the bytes of what is gathered now."""
    return sum(one.numel() * one.element_size() for one in backbone.parameters())


def run_rank(number: int, backbone: Path, output: Path) -> None:
    """Be one rank of a case; the first writes the larger peak of the two."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    measurements: list[Any] = [None] * RANKS
    dist.all_gather_object(measurements, measure(CASES[number], backbone))
    if dist.get_rank() == 0:
        worst = max(measurements, key=lambda one: one["measured"])
        output.write_text(json.dumps(worst), encoding="utf-8")
    dist.destroy_process_group()


def table(rows: list[tuple[Case, dict[str, Any]]]) -> str:
    """Return the Markdown table, in MiB; ratios of predicted to measured beyond 15 % are marked."""
    titles = ["backbone", "stored as", "rows × tokens", "resident", "checkpointing", "preset", "predicted", "measured"]
    titles += ["ratio", "between steps", "shards planned", "shards held"]
    lines = [f"| {' | '.join(titles)} |", "|---|---|---|---|---|---|---:|---:|---:|---:|---:|---:|"]
    for case, result in rows:
        ratio = result["predicted"] / result["measured"]
        mark = "" if abs(ratio - 1) <= 0.15 else " (beyond 15 %)"
        stored = case.dtype if case.quantization == "none" else case.quantization
        checkpointing = "on" if case.checkpointing else "off"
        lines.append(
            f"| {case.model} | {stored} | {case.shape[0]} × {sum(case.shape[1:])} | {case.resident} | {checkpointing} "
            f"| {case.preset} "
            f"| {result['predicted'] / MIB:.0f} | {result['measured'] / MIB:.0f} | {ratio:.2f}{mark} "
            f"| {result['between_steps'] / MIB:.0f} "
            f"| {result['predicted_shards'] / MIB:.1f} | {result['shards'] / MIB:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run every case, print the table and, with a path, write the JSON; with --rank, be a rank of one case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", nargs="?", type=Path, help="JSON to write")
    parser.add_argument("--only", type=int, action="append", help="number of a case; may be repeated")
    parser.add_argument("--short", action="store_const", const=SHORT, dest="only", help="six of the cases")
    parser.add_argument("--rank", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--make", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        make_backbone(options.make[0], options.make[1], Path(options.make[2]))
        return
    if options.rank:
        run_rank(int(options.rank[0]), Path(options.rank[1]), Path(options.rank[2]))
        return
    rows = []
    with tempfile.TemporaryDirectory(prefix="memory-") as scratch:
        for number, case in enumerate(CASES):
            if options.only and number not in options.only:
                continue
            backbone = Path(scratch) / f"{case.model}-{case.dtype}"
            if not backbone.is_dir():
                # In a process of its own: what it leaves in the page cache is no rank's memory.
                make = [sys.executable, "-m", "benchmarks.memory", "--make", case.model, case.dtype, scratch]
                subprocess.run(make, check=True)
            answer = Path(scratch) / "answer.json"
            group = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
            words = ["-m", "benchmarks.memory", "--rank", str(number), str(backbone), str(answer)]
            answer.unlink(missing_ok=True)
            # Gloo's threads now and then abort a rank that has answered and is on its way out.
            subprocess.run([sys.executable, "-W", "ignore", *group, *words], check=False)
            if not answer.exists():
                raise SystemExit(f"case {number} gave no answer; see above")
            rows.append((case, json.loads(answer.read_text(encoding="utf-8"))))
            print(table(rows[-1:]).splitlines()[-1], flush=True)
    print(table(rows))
    if options.output:
        machine = {"processor": platform.processor() or platform.machine(), "cores": len(os.sched_getaffinity(0))}
        report = {"cases": [{**vars(case), **result} for case, result in rows], "machine": machine}
        text = json.dumps(report | {"versions": package_versions()}, indent=2)
        options.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
