"""Our side of the step benchmark: all variants in one process group, each taking its step in turn."""

import os
import sys
import time
import types
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.batches import batches_of, bucket, recipe_of
from benchmarks.step import RANKS, ROUNDS, WARM_UP_STEPS
from benchmarks.turns import TurnFollower
from hyperscale.engine.base import Engine
from hyperscale.engine.collective import TorchCollective
from hyperscale.model.adapted import AdaptedModel
from hyperscale.model.backbone import open_backbone
from hyperscale.run.worker import build_engine

ENGINES = {
    # name -> changes of the recipe, and whether gathers come out of shared memory
    "none": (("engine.resident=none",), True),
    "none, messages": (("engine.resident=none",), False),
    "auto": (("engine.resident=auto",), True),
    "all": (("engine.resident=all",), True),
    "local": (("engine.kind=local",), True),
}
GROUPS = {
    # Rows of one process group, since some engines change how its C library gives memory back (engine/host_memory.py):
    # row -> engine, all logits or only those of labels, batches bucketed by length.
    "ours": {
        "none": ("none", True, False),
        "none, gathers as gloo messages": ("none, messages", True, False),
        "none, logits of labels only": ("none", False, False),
    },
    "ours by default": {"auto": ("auto", True, False)},
    "ours for speed": {
        "all": ("all", True, False),
        "unsharded": ("local", True, False),
        "all, logits of labels only": ("all", False, False),
    },
    "ours bucketed": {
        "none, bucketed": ("none", True, True),
        "none, bucketed, logits of labels only": ("none", False, True),
    },
}


def all_logits(model: AdaptedModel, ids: Tensor, attention_mask: Tensor, _labels: Tensor, positions: Tensor) -> Any:
    """Compute the logits of all tokens, as PEFT's side does, and pick those of the labels."""
    logits = model.backbone(input_ids=ids, attention_mask=attention_mask, use_cache=False).logits
    return logits.flatten(0, 1).index_select(0, positions)


def main() -> None:
    """Be one rank: `group dtype folder` on the command line."""
    group, dtype, folder = sys.argv[1:]
    here = GROUPS[group]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, device = dist.get_rank(), torch.device("cpu")
    engines: dict[str, Engine] = {}
    for name in dict.fromkeys(engine for engine, _, _ in here.values()):
        changes, is_shared = ENGINES[name]
        os.environ["HYPERSCALE_SHARED_SHARDS"] = str(int(is_shared))
        recipe = recipe_of(dtype, RANKS, *changes)
        engines[name] = build_engine(recipe, open_backbone(recipe.backbone), TorchCollective(device), device, 7)
    steps = WARM_UP_STEPS + ROUNDS
    batches = {
        bucketed: batches_of(recipe_of(dtype, RANKS, bucket(bucketed)), rank, steps) for bucketed in (False, True)
    }
    turns = TurnFollower(folder)
    for number in range(steps):
        if rank == 0:
            turns.wait(number)
        figures = {}
        for row, (name, is_full, bucketed) in here.items():
            model = engines[name].model
            model.label_logits = types.MethodType(all_logits if is_full else AdaptedModel.label_logits, model)  # type: ignore[method-assign]
            dist.barrier()
            start, processor = time.perf_counter(), time.process_time()
            result = engines[name].train_step(batches[bucketed][number], number)
            figures[row] = {
                "seconds": time.perf_counter() - start,
                "processor": time.process_time() - processor,
                "tokens": result.tokens,
            }
        if rank == 0:
            turns.done(number, figures)
    dist.barrier()


if __name__ == "__main__":
    main()
