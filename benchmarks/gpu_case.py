"""One case of benchmarks.gpu, in a process of its own: `CASE_JSON SCRATCH ANSWER` on the command line."""

import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import transformers
from safetensors.torch import save_file
from torch.distributed import HashStore

from benchmarks import gpu_peer
from benchmarks.shapes import LLAMA_1B, LLAMA_8B, Q_AND_V
from hyperscale.config.run import Recipe
from hyperscale.data.collate import IGNORED, Batch
from hyperscale.engine.base import Engine
from hyperscale.engine.collective import Collective, SingleProcess, TorchCollective
from hyperscale.engine.ds_config import read_sharding
from hyperscale.model.backbone import BackboneFolder, open_backbone
from hyperscale.planning.memory import describe_run, plan_memory, step_shape
from hyperscale.planning.traffic import step_operations
from hyperscale.run.worker import build_engine

TASKS = 8
TARGET = 16
WARM_UP, MEASURED = 3, 10
LLAMA: dict[str, dict[str, Any]] = {
    "llama-tiny": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    },
    "llama-1b": LLAMA_1B,
    "llama-8b": {**LLAMA_8B, "rope_theta": 500000.0},
}
T5: dict[str, dict[str, Any]] = {
    "t5-tiny": {"d_model": 64, "d_ff": 128, "d_kv": 16, "num_layers": 2, "num_heads": 4, "vocab_size": 512},
    "t5-3b": {"d_model": 1024, "d_ff": 16384, "d_kv": 128, "num_layers": 24, "num_heads": 32, "vocab_size": 32128},
}
FILE_BYTES = 4 * 2**30


def make_backbone(model: str, scratch: Path, device: torch.device) -> Path:
    """Save a model of random bf16 weights, made on the device, in files of a few GiB; once a scratch folder."""
    target = scratch / model
    if (target / "model.safetensors.index.json").exists():
        return target
    if model in LLAMA:
        shape = {"max_position_embeddings": 4096, "tie_word_embeddings": False, **LLAMA[model]}
        config: Any = transformers.LlamaConfig(**shape)
        kind: Any = transformers.LlamaForCausalLM
    else:
        config = transformers.T5Config(decoder_start_token_id=0, **T5[model])
        kind = transformers.T5ForConditionalGeneration
    with torch.device("meta"):
        empty = kind(config)
    config.save_pretrained(target)
    files: dict[str, str] = {}
    held: dict[str, torch.Tensor] = {}

    def flush() -> None:
        name = f"model-{len(set(files.values())) + 1:05d}.safetensors"
        save_file(held, target / name, metadata={"format": "pt"})
        files.update(dict.fromkeys(held, name))
        held.clear()

    for name, one in empty.named_parameters():
        is_norm = one.dim() == 1
        weight = torch.ones(one.shape, device=device) if is_norm else 0.02 * torch.randn(one.shape, device=device)
        held[name] = weight.to(torch.bfloat16).cpu()
        if sum(tensor.nbytes for tensor in held.values()) > FILE_BYTES:
            flush()
    flush()
    index = {"metadata": {}, "weight_map": files}
    (target / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return target


def model_class(backbone: Path) -> str:
    """Return the transformers class of a backbone that `make_backbone` has made."""
    return "LlamaForCausalLM" if backbone.name in LLAMA else "T5ForConditionalGeneration"


def recipe_of(case: dict[str, Any], backbone: Path, device: torch.device) -> Recipe:
    """Return LoRA r = 8 on q and v from the hypernetwork, for eight tasks, nothing resident."""
    workers, rows = case.get("processes", 1), case.get("rows", 1)
    return Recipe.model_validate(
        {
            "name": "gpu",
            "output": str(backbone.parent / "run"),
            "backbone": {"name": str(backbone), "dtype": "bfloat16"},
            "adaptation": {"adapters": [Q_AND_V]},
            "data": {
                "tasks": [f"task{number}" for number in range(TASKS)],
                "max_source_tokens": case.get("length", 64) - TARGET,
                "max_target_tokens": TARGET,
            },
            "training": {"steps": 1000, "batch_size": workers * rows, "micro_batch_size": rows},
            "engine": {
                "kind": "local" if case["engine"] == "local" else "zero",
                "resident": "none",
                "activation_checkpointing": case.get("checkpointing", False),
            },
            "cluster": {"workers": workers, "gpus_per_worker": int(device.type == "cuda")},
            "tracking": {"mlflow": {"enabled": False}},
        }
    )


def random_batch(case: dict[str, Any], folder: BackboneFolder, seed: int) -> Batch:
    """Return full rows of random tokens, the last of them the answer, their tasks in turn."""
    rows, source = case["rows"], case["length"] - TARGET
    random = torch.Generator().manual_seed(seed)
    answers = torch.randint(3, 500, (rows, TARGET), generator=random)
    prompts = torch.randint(3, 500, (rows, source), generator=random)
    ids = prompts if folder.architecture.is_encoder_decoder else torch.cat([prompts, answers], dim=1)
    labels = answers if folder.architecture.is_encoder_decoder else torch.full_like(ids, IGNORED)
    labels[:, -TARGET:] = answers
    tasks = torch.arange(rows) % TASKS
    return Batch(ids, torch.ones_like(ids), labels, tasks, rows * case["length"])


def run_losses(case: dict[str, Any], scratch: Path, device: torch.device) -> dict[str, Any]:
    """Return the losses of five steps: `local` and `zero` must agree to bf16's rounding."""
    with process_group(case, device) as collective:
        engine, folder = engine_of(case, scratch, device, collective)
        losses = []
        for step in range(5):
            whole = random_batch({**case, "rows": case["rows"] * collective.world_size}, folder, step)
            losses.append(engine.train_step([_share(whole, collective, case["rows"])], step).loss)
    return {f"loss {number}": loss for number, loss in enumerate(losses, start=1)}


def run_load(case: dict[str, Any], scratch: Path, device: torch.device) -> dict[str, Any]:
    """Return seconds, and by how much the peak of host memory grew."""
    backbone = make_backbone(case["model"], scratch, device)
    for file in backbone.glob("*.safetensors"):  # a warm page cache for both sides
        with file.open("rb") as stream:
            while stream.read(2**26):
                pass
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    if case["engine"] == "peft":
        gpu_peer.load(backbone, model_class(backbone))
    else:
        with process_group(case, device) as collective:
            engine_of(case, scratch, device, collective)
    _wait(device)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"seconds": time.perf_counter() - start, "host_mib": grown}


def run_step(case: dict[str, Any], scratch: Path, device: torch.device) -> dict[str, Any]:
    """Return the speed of a step, its share of the operations that a matrix product reaches, and memory."""
    backbone = make_backbone(case["model"], scratch, device)
    operations = _operations(case, backbone, device)
    if case["engine"] == "peft":
        folder = open_backbone(recipe_of(case, backbone, device).backbone)
        batch = random_batch(case, folder, 0)
        seconds, peak = gpu_peer.step_seconds(
            backbone, model_class(backbone), batch, case["checkpointing"], WARM_UP, MEASURED
        )
        return _speed(case, operations, seconds, peak, device)
    with process_group(case, device) as collective:
        engine, folder = engine_of(case, scratch, device, collective)
        batch = random_batch(case, folder, 0)
        seconds, peak = _timed(lambda number: engine.train_step([batch], number), device)
        figures = _speed(case, operations, seconds, peak, device)
        tasks = torch.arange(min(TASKS, case["rows"]), device=device)
        figures["generation_share"] = _generation_seconds(engine, tasks, device) / seconds
        recipe = recipe_of(case, backbone, device)
        kind: Literal["cpu", "cuda"] = "cuda" if device.type == "cuda" else "cpu"
        plan = plan_memory(describe_run(recipe, folder), read_sharding(recipe.engine, 1, kind), frozenset(), kind)
        figures["planned_gib"] = plan.total / 2**30
    return figures


def run_matmul(case: dict[str, Any], _scratch: Path, device: torch.device) -> dict[str, Any]:
    """Return the rate of a square bf16 product, in TFLOP/s."""
    return {"tflops": matmul_rate(case["size"], device) / 1e12}


def matmul_rate(size: int, device: torch.device) -> float:
    """Return operations a second of a square bf16 product."""
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds, _ = _timed(lambda _number: left @ right, device)
    return 2 * size**3 / seconds


def engine_of(
    case: dict[str, Any], scratch: Path, device: torch.device, collective: Collective
) -> tuple[Engine, BackboneFolder]:
    recipe = recipe_of(case, make_backbone(case["model"], scratch, device), device)
    folder = open_backbone(recipe.backbone)
    return build_engine(recipe, folder, collective, device, TASKS), folder


@contextmanager
def process_group(case: dict[str, Any], device: torch.device) -> Iterator[Collective]:
    """Bring up what the engine wants: a group of one, or that of torchrun on the one device."""
    backend = case.get("backend") or ("nccl" if device.type == "cuda" else "gloo")
    if case.get("processes", 1) > 1:
        os.environ["LOCAL_RANK"] = "0"  # DeepSpeed takes the device of that number, and all are to share the first
        dist.init_process_group(backend, timeout=timedelta(minutes=5))
    else:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    try:
        yield TorchCollective(device) if dist.get_world_size() > 1 else SingleProcess()
    finally:
        dist.destroy_process_group()


def _share(batch: Batch, collective: Collective, rows: int) -> Batch:
    here = slice(collective.rank * rows, (collective.rank + 1) * rows)
    return Batch(
        batch.input_ids[here],
        batch.attention_mask[here],
        batch.labels[here],
        batch.task_index[here],
        batch.num_tokens // collective.world_size,
    )


def _operations(case: dict[str, Any], backbone: Path, device: torch.device) -> float:
    """Return the operations of a step without recomputation, before a peer tells transformers of DeepSpeed."""
    recipe = recipe_of({**case, "engine": "zero"}, backbone, device)
    return step_operations(describe_run(recipe, open_backbone(recipe.backbone)), step_shape(recipe), checkpointed=False)


def _speed(case: dict[str, Any], operations: float, seconds: float, peak: int, device: torch.device) -> dict[str, Any]:
    return {
        "step_seconds": seconds,
        "tokens_per_second": case["rows"] * case["length"] / seconds,
        "share_of_matmul": operations / seconds / matmul_rate(8192 if device.type == "cuda" else 512, device),
        "peak_gib": peak / 2**30,
    }


def _timed(run: Callable[[int], Any], device: torch.device) -> tuple[float, int]:
    """Return the median seconds of a call, and the device's peak memory in bytes (0 on CPUs)."""
    seconds = []
    for number in range(WARM_UP + MEASURED):
        if number == WARM_UP and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        _wait(device)
        start = time.perf_counter()
        run(number)
        _wait(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[WARM_UP:]), torch.cuda.max_memory_allocated() if device.type == "cuda" else 0


def _generation_seconds(engine: Engine, tasks: torch.Tensor, device: torch.device) -> float:
    """Return the seconds of making all adapters of a step and of the way back through the generator."""

    def there_and_back(_number: int) -> None:
        weights = engine.model.generator(tasks)
        sum(tensor.sum() for group in weights.values() for tensor in group.values()).backward()  # type: ignore[union-attr]

    seconds, _ = _timed(there_and_back, device)
    engine.model.generator.zero_grad()
    return seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


RUNS = {"matmul": run_matmul, "losses": run_losses, "load": run_load, "step": run_step}


def main() -> None:
    """Run the case and leave the answer where it was asked for."""
    case, scratch, answer = json.loads(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    torch.manual_seed(0)
    figures = RUNS[case["run"]](case, scratch, device)
    if int(os.environ.get("RANK", "0")) == 0:
        answer.write_text(json.dumps(figures), encoding="utf-8")


if __name__ == "__main__":
    main()
