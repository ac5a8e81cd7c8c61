"""What two real ranks gather in a step, and that reading each other's memory is the same as DeepSpeed's messages."""

import gc
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from hyperscale.config.run import Recipe
from hyperscale.engine import shared_shards
from hyperscale.engine.base import StepResult
from hyperscale.engine.zero import shard_backbone
from hyperscale.model.backbone import open_backbone
from tests import tiny
from tests.gathers import Gather, logged_gathers
from tests.ranks import Ranks
from tests.runs import CPU, corpus_of, engine_of, loader_of, make_recipe

SWITCH = "HYPERSCALE_SHARED_SHARDS"


@dataclass(frozen=True)
class Gathered:
    """One rank's steps, and what it gathered in the last one."""

    steps: list[StepResult]
    gathers: list[Gather]
    shapes: dict[str, tuple[int, ...]]
    is_shared: bool
    """Whether gathers came out of shared memory."""
    backbone_in_file: bool


def steps_of(recipe: Recipe, shared: bool) -> Gathered:
    os.environ[SWITCH] = str(int(shared))
    engine, corpus = engine_of(recipe), corpus_of(recipe)
    loader = loader_of(recipe, corpus, engine.collective.rank, engine.collective.world_size)
    parameters: dict[str, Any] = dict(engine.model.backbone.named_parameters())
    # Twice DeepSpeed learns the order of the blocks; from then on it fetches ahead.
    steps = [engine.train_step(loader.next_step(), step) for step in range(3)]
    with logged_gathers(engine.model.backbone) as gathers:
        steps.append(engine.train_step(loader.next_step(), 3))
    num_gathers = len(gathers)
    steps.append(engine.train_step(loader.next_step(), 4))
    assert len(gathers) == num_gathers  # nothing is listed outside the `with`
    one = next(iter(parameters.values()))
    return Gathered(
        steps,
        gathers,
        {name: tuple(parameter.ds_shape) for name, parameter in parameters.items()},
        isinstance(one.all_gather_coalesced, shared_shards._SharedGather),
        any("hyperscale-shards" in line for line in Path("/proc/self/maps").read_text().splitlines()),
    )


# As in every real backbone but the largest, the embedding has more parameters than two blocks.
LLAMA = {"num_hidden_layers": 4, "intermediate_size": 32}
MODELS = {
    # name -> family, configuration, pieces of an embedding's name, uses of it: input, head forward, head backward
    "llama-tied": ("llama", LLAMA, {"embed_tokens": 3}),
    "llama-untied": ("llama", LLAMA | {"tie_word_embeddings": False}, {"embed_tokens": 1, "lm_head": 2}),
    # encoder and decoder look their tokens up together
    "t5-tied": ("t5", {"num_layers": 3, "tie_word_embeddings": True, "feed_forward_proj": "relu"}, {"shared": 3}),
    "t5-untied": ("t5", {"num_layers": 3}, {"shared": 1, "lm_head": 2}),
}


TIED, OWN_HEAD, BOTH = {"embed_tokens": 3}, {"embed_tokens": 1, "lm_head": 2}, {"shared": 3}
FAMILIES = {
    name: (name, {"tie_word_embeddings": name not in ("qwen3", "olmo3")}, uses)
    for name in tiny.FAMILIES
    for uses in [BOTH if name.endswith("t5") else OWN_HEAD if name in ("qwen3", "olmo3") else TIED]
}
QUICK = ("gemma2", "umt5")
"""Of the other families, those of `make test`: norms after sub-layers, and a position bias in every block."""
CASES = [
    *(pytest.param(name, checkpointing) for name in MODELS for checkpointing in (False, True)),
    *(
        pytest.param(name, checkpointing, marks=() if name in QUICK and checkpointing else pytest.mark.long)
        for name in FAMILIES
        for checkpointing in (False, True)
    ),
]


@pytest.mark.parametrize(("name", "checkpointing"), CASES)
def test_a_block_is_gathered_once_a_pass(
    two_ranks: Ranks, tasks: list[str], tmp_path: Path, name: str, checkpointing: bool
):
    family, changes, uses = (MODELS | FAMILIES)[name]
    if family in tiny.FAMILIES:
        folder = tiny.tiny_family(tmp_path / name, family, **changes)
    else:
        folder = (tiny.tiny_llama if family == "llama" else tiny.tiny_t5)(tmp_path / name, **changes)
    recipe = make_recipe(
        folder,
        tasks,
        tmp_path,
        adaptation={"adapters": [{"kind": "lora", "targets": "all"}, {"kind": "bottleneck"}, {"kind": "norm_delta"}]},
        training={"steps": 5, "batch_size": 8, "micro_batch_size": 4, "optimizer": {"warmup_steps": 1}},
        engine={"kind": "zero", "resident": "none", "activation_checkpointing": checkpointing},
        cluster={"workers": 2},
    )
    shared, sent = two_ranks.run(steps_of, recipe, True), two_ranks.run(steps_of, recipe, False)
    assert [one.is_shared for one in (*shared, *sent)] == [True, True, False, False]
    assert shared[0].backbone_in_file
    # Memory or messages: the same gathers in the same order, and bitwise the same training.
    assert shared[0].gathers == shared[1].gathers == sent[0].gathers == sent[1].gathers
    assert shared[0].steps == shared[1].steps == sent[0].steps == sent[1].steps

    gathers, shapes = sent[0].gathers, sent[0].shapes
    blocks = {block_of(one) for one in shapes} - {""}
    times = Counter(name for gather in gathers for name in gather.names)
    assert set(times) == set(shapes)
    # The least there can be with nothing resident: blocks and norms in both passes, embeddings at each use; running the
    # blocks again adds nothing.
    most = {one: uses.get(one.split(".")[-2], 2) for one in shapes}
    assert all(count <= most[one] for one, count in times.items()), times
    # Forward and backward a block comes whole, in one gather and without a part of another.
    whole = {block: {one for one in shapes if block_of(one) == block} for block in blocks}
    passes: Counter[str] = Counter()
    for gather in gathers:
        for block in {block_of(one) for one in gather.names} - {""}:
            assert {one for one in gather.names if block_of(one)} == whole[block]
            passes[block] += 1
    assert passes == dict.fromkeys(blocks, 2)
    # Besides them the norms come with what follows them, and embeddings at their uses.
    assert len(gathers) <= 2 * len(blocks) + sum(uses.values())
    share = {one: -(-torch.Size(shape).numel() // 2) * 4 for one, shape in shapes.items()}
    received = sum(gather.received_bytes for gather in gathers)
    assert received == sum(share[one] * count for one, count in times.items())
    assert received <= sum(size * most[one] for one, size in share.items())


def block_of(parameter: str) -> str:
    """Return `model.layers.3` of a parameter in a block, "" of any other."""
    pieces = parameter.split(".")
    number = next((place for place, piece in enumerate(pieces) if piece.isdigit()), None)
    return "" if number is None else ".".join(pieces[: number + 1])


def share(folder: Path, reachable: bool) -> tuple[bool, bool, int]:
    """Shard, and let rank 1 seem elsewhere or not; return whether shards are shared, whether the whole is right, and
    the files left open: the rank's own, the mapping of it and the other rank's.
    """
    os.environ[SWITCH] = "1"
    machine = shared_shards._machine
    gc.collect()  # the files of earlier backbones go with them
    before = open_shards()
    if not reachable and torch.distributed.get_rank() == 1:
        shared_shards._machine = lambda: ("elsewhere", "")
    recipe = make_recipe(folder, ["none"], folder, engine={"kind": "zero"}, cluster={"workers": 2})
    try:
        backbone, _ = shard_backbone(
            open_backbone(recipe.backbone), recipe.backbone, recipe.engine, recipe.training, CPU, 2
        )
    finally:
        shared_shards._machine = machine
    parameters: list[Any] = list(backbone.parameters())
    expected = []
    for parameter in parameters:
        parameter.all_gather([parameter])  # DeepSpeed's other way, from the same shards
        expected.append(parameter.detach().clone())
        parameter.partition([parameter])
    handle = parameters[0].all_gather_coalesced(parameters)
    handle.wait()
    right = all(torch.equal(parameter, whole) for parameter, whole in zip(parameters, expected, strict=True))
    for parameter in parameters:
        parameter.partition([parameter])
    handle.wait()  # the coordinator asks once for each parameter: what has been let go stays so
    right &= all(parameter.numel() == 0 and parameter.ds_status.name == "NOT_AVAILABLE" for parameter in parameters)
    done = isinstance(parameters[0].all_gather_coalesced, shared_shards._SharedGather)
    return done, right, open_shards() - before


def open_shards() -> int:
    links = (str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink())
    return sum("hyperscale-shards" in link for link in links)


def test_shards_are_shared_where_all_ranks_reach_each_other(two_ranks: Ranks, tiny_t5_folder: Path):
    assert two_ranks.run(share, tiny_t5_folder, True) == [(True, True, 3)] * 2
    # One rank on another machine: nobody shares, and only the mapping of each rank's own file stays.
    assert two_ranks.run(share, tiny_t5_folder, False) == [(False, True, 1)] * 2
