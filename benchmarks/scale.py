"""Estimates for many GPUs: the output of `hyperscale plan` for large backbones, as the table in docs/performance.md.

Nothing here is measured. `python -m benchmarks.scale` prints the table, with `--write` it puts it into the document.
"""

import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.shapes import LLAMA_8B, LLAMA_70B, Q_AND_V
from hyperscale.config.run import Recipe
from hyperscale.config.sizes import parse_size
from hyperscale.model.backbone import open_shapes
from hyperscale.planning.memory import RESERVE, Sharding, describe_run, plan_memory, resident_parts, step_shape
from hyperscale.planning.traffic import plan_pace, plan_traffic, step_operations

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "performance.md"
BEGIN, END = "<!-- scale: python -m benchmarks.scale --write -->", "<!-- scale ends -->"
GPUS = (8, 32, 128, 1024)
GPU_MEMORY = "80GiB"
RATE = 300e12
"""Operations a second of one H100 in bf16: three tenths of its peak of 989e12 (NVIDIA's data sheet)."""
BANDWIDTH = {True: 300e9, False: 40e9}
"""Bytes a second one GPU receives: inside a node over NVLink (two thirds of 450e9), between nodes over 400 Gbit/s."""
GPUS_A_NODE = 8
SHAPES: Mapping[str, dict[str, Any]] = {
    "LLaMA-3 8B": {"model_type": "llama", **LLAMA_8B},
    "T5-11B": {
        "model_type": "t5",
        "d_model": 1024,
        "d_ff": 65536,
        "d_kv": 128,
        "num_heads": 128,
        "num_layers": 24,
        "num_decoder_layers": 24,
        "vocab_size": 32128,
        "feed_forward_proj": "relu",
        "decoder_start_token_id": 0,
    },
    "LLaMA-3 70B": {"model_type": "llama", **LLAMA_70B},
}
"""Published configurations (arXiv 2407.21783, table 3; arXiv 1910.10683, section 3.7)."""


def write_config(name: str, folder: Path) -> Path:
    """Write a backbone's config.json, all that planning needs of it."""
    target = folder / name.replace(" ", "-")
    target.mkdir(parents=True, exist_ok=True)
    (target / "config.json").write_text(json.dumps(SHAPES[name]), encoding="utf-8")
    return target


def recipe_of(backbone: Path, gpus: int, **engine: Any) -> Recipe:
    """Return the run of the table: 8 tasks, LoRA r = 8 on q and v, 8 rows of 256 + 16 tokens a GPU."""
    return Recipe.model_validate(
        {
            "name": "scale",
            "output": "scale",
            "backbone": {"name": str(backbone), "attention": "sdpa"},
            "adaptation": {"adapters": [Q_AND_V]},
            "data": {"tasks": [f"task{number}" for number in range(8)], "max_target_tokens": 16},
            "training": {"steps": 1000, "batch_size": 8 * gpus, "micro_batch_size": 8},
            "engine": {"activation_checkpointing": True, **engine},
            "cluster": {"workers": gpus, "gpus_per_worker": 1},
        }
    )


def table() -> str:
    """Return the Markdown table, with `engine.resident: none` and with `auto`."""
    lines = [
        "| backbone | GPUs | shard | peak, none | received | tokens/s | resident by auto | received | tokens/s |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    with tempfile.TemporaryDirectory(prefix="scale-") as scratch:
        for name in SHAPES:
            backbone = write_config(name, Path(scratch))
            lines += _rows(name, backbone)
    return "\n".join(lines)


def _rows(name: str, backbone: Path) -> list[str]:
    recipe = recipe_of(backbone, GPUS[0])
    workload, shape = describe_run(recipe, open_shapes(recipe.backbone)), step_shape(recipe)
    operations = step_operations(workload, shape, checkpointed=True)
    rows = []
    for gpus in GPUS:
        sharding = Sharding(gpus)
        bare = plan_memory(workload, sharding, frozenset(), "cuda")
        spare = parse_size(GPU_MEMORY) * (1 - RESERVE) - bare.total
        kept = resident_parts(recipe.engine.resident, workload.parts, spare)
        cells = [name, f"{gpus:,}", _gib(bare.items["backbone shard"]), _gib(bare.total)]
        for resident in (frozenset[str](), kept):
            traffic = plan_traffic(workload, sharding, resident, micro_batches=1)
            tokens = gpus * shape.rows * (shape.source_tokens + shape.target_tokens)
            pace = plan_pace(operations, traffic, tokens, RATE, BANDWIDTH[gpus <= GPUS_A_NODE])
            if resident is kept:
                share = sum(part.numel for part in workload.parts if part.name in kept)
                cells.append(f"{100 * share / sum(part.numel for part in workload.parts):.0f} %")
            cells += [_gib(traffic.total), f"{pace.tokens_per_second:,.0f}"]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"


def between_marks(text: str) -> str:
    """Return what stands in a document between the marks.

    Raises:
        ValueError: a mark is missing.
    """
    start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    return text[start:end].strip()


def main() -> None:
    """Print the table, or write it into the document."""
    new_table = table()
    if "--write" not in sys.argv[1:]:
        print(new_table)
        return
    text = DOCUMENT.read_text(encoding="utf-8")
    DOCUMENT.write_text(text.replace(between_marks(text), new_table), encoding="utf-8")


if __name__ == "__main__":
    main()
