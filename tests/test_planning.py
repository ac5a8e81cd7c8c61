"""The plan of a run: against published shapes, against a real step, and as the command prints it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import scale
from hyperscale.config.backbone import BackboneSettings
from hyperscale.config.run import Recipe
from hyperscale.config.sizes import format_size, parse_size
from hyperscale.engine.ds_config import read_sharding
from hyperscale.engine.zero import ZeroEngine
from hyperscale.model.adapted import label_positions, token_losses
from hyperscale.model.backbone import build_empty, load_dense, open_backbone, open_shapes
from hyperscale.model.generation import EagerGeneration
from hyperscale.planning.memory import Sharding, describe_run, plan_memory, scale_rows, step_shape
from hyperscale.planning.parts import find_parts
from hyperscale.planning.trace import StepShape, build_meta_model, trace_step
from hyperscale.planning.traffic import plan_traffic, step_operations
from tests import tiny
from tests.command import run
from tests.gathers import logged_gathers
from tests.ranks import Ranks
from tests.runs import corpus_of, engine_of, loader_of, make_recipe, write_tasks


def recipe_of(path: Path, **changes: Any) -> Recipe:
    return make_recipe(path, ["a.yaml", "b.yaml", "c.yaml"], path, **changes)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("LLaMA-3 8B", 8_030_261_248), ("T5-11B", 11_307_321_344), ("LLaMA-3 70B", 70_553_706_496)],
)
def test_published_counts_from_a_config_alone(tmp_path: Path, name: str, parameters: int) -> None:
    backbone = scale.write_config(name, tmp_path)
    assert [path.name for path in backbone.iterdir()] == ["config.json"]
    settings = BackboneSettings(name=str(backbone))
    folder = open_shapes(settings)
    parts = find_parts(build_empty(folder, settings), folder.architecture)
    assert sum(part.numel for part in parts) == parameters
    assert len({part.name for part in parts}) == len(parts)
    assert sum(part.is_block for part in parts) == {"LLaMA-3 8B": 32, "T5-11B": 48, "LLaMA-3 70B": 80}[name]
    gathers = {part.name: part.gathers for part in parts if part.numel > 2**24 and not part.is_block}
    assert gathers == ({"shared": 3} if name == "T5-11B" else {"model.embed_tokens": 1, "lm_head": 2})


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_family_is_planned_from_its_config_alone(tmp_path: Path, family: str) -> None:
    tied = not family.endswith("t5")  # as their checkpoints are
    whole = tiny.tiny_family(tmp_path / "whole", family, tie_word_embeddings=tied)
    stored = load_dense(open_backbone(recipe_of(whole).backbone), recipe_of(whole).backbone)
    described = json.loads((whole / "config.json").read_text()) | {"tie_word_embeddings": tied}
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text(json.dumps(described))
    recipe = recipe_of(bare, adaptation={"adapters": [{"kind": "lora", "targets": "all"}]})
    workload = describe_run(recipe, open_shapes(recipe.backbone))
    assert sum(part.numel for part in workload.parts) == sum(one.numel() for one in stored.parameters())
    assert sum(part.is_block for part in workload.parts) == (4 if family.endswith("t5") else 2)
    assert workload.trace.kept > 0


def test_an_untied_head_is_believed_without_weights(tmp_path: Path) -> None:
    described = scale.SHAPES["T5-11B"] | {"num_layers": 1, "num_decoder_layers": 1, "d_ff": 64}
    counts = []
    for number, changes in enumerate(({}, {"tie_word_embeddings": False})):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(described | changes))
        settings = BackboneSettings(name=str(folder))
        shapes = open_shapes(settings)
        counts.append(sum(part.numel for part in find_parts(build_empty(shapes, settings), shapes.architecture)))
    assert counts[1] - counts[0] == 32128 * 1024


@pytest.mark.parametrize("family", ["llama", "t5", *tiny.FAMILIES])
def test_the_trace_keeps_what_a_real_step_keeps(request: pytest.FixtureRequest, family: str, tmp_path: Path) -> None:
    if family in tiny.FAMILIES:
        path = tiny.tiny_family(tmp_path / family, family)
    else:
        path = request.getfixturevalue(f"tiny_{family}_folder")
    shape = StepShape(rows=4, source_tokens=24, target_tokens=8, tasks=3)
    adapters = [{"kind": "lora", "rank": 4, "targets": "all"}, {"kind": "bottleneck"}, {"kind": "norm_delta"}]
    recipe = recipe_of(path, adaptation={"adapters": adapters})
    traced = trace_step(build_meta_model(recipe, open_backbone(recipe.backbone)), shape)

    model = tiny.adapted_model(path, recipe.adaptation.model_dump())
    generation = EagerGeneration(model.generator(torch.arange(3)))
    is_seq2seq = model.architecture.is_encoder_decoder
    length = 24 if is_seq2seq else 32
    ids = torch.randint(3, 200, (4, length))
    labels = torch.full((4, 8 if is_seq2seq else length), -100)
    labels[:, -8:] = 5
    positions, _, _ = label_positions(labels, is_seq2seq)
    owned = {one.untyped_storage().data_ptr() for one in model.backbone.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        model.training(generation, torch.tensor([0, 1, 2, 0]), 3),
    ):
        logits = model.label_logits(ids, torch.ones_like(ids), labels, positions)
    saved = sum(kept.values()) - logits.nbytes
    # What autograd saved, and besides it what the model itself holds on to: masks, position biases, hidden states.
    assert saved * 0.9 <= traced.kept <= saved * 1.2
    assert token_losses(logits, torch.full((len(positions),), 5)).shape == (32,)
    # The gradient of the logits, and the fp32 form of a few rows at a time (model/losses.py): here of all 32. Besides,
    # a soft cap keeps what it made of the logits.
    most = 4 if model.backbone.config.to_dict().get("final_logit_softcapping") else 3
    assert (most - 1) * logits.nbytes <= traced.loss < most * logits.nbytes


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_what_moves_the_memory(request: pytest.FixtureRequest, family: str) -> None:
    path = request.getfixturevalue(f"tiny_{family}_folder")
    folder = open_backbone(recipe_of(path).backbone)
    plain = describe_run(recipe_of(path), folder)
    again = describe_run(recipe_of(path, engine={"activation_checkpointing": True}), folder)
    assert again.trace.kept < plain.trace.kept / 3
    fused = recipe_of(path, backbone={"name": str(path), "dtype": "float32", "attention": "sdpa"})
    assert describe_run(fused, folder).trace.kept < plain.trace.kept  # no product of all pairs of tokens

    shape = step_shape(recipe_of(path))
    assert (shape.rows, shape.tasks) == (2, 3)
    larger = [describe_run(recipe_of(path), folder, replace(shape, rows=rows)) for rows in (8, 16, 64)]
    guessed = scale_rows(larger[0], larger[1], (8, 16), 64)
    assert guessed.trace.kept == pytest.approx(larger[2].trace.kept, rel=0.01)
    assert guessed.trace.loss == pytest.approx(larger[2].trace.loss, rel=0.01)

    whole = sum(part.numel for part in plain.parts) * 4
    everything = frozenset(part.name for part in plain.parts)
    none, all_of_it = (plan_memory(plain, Sharding(4), kept, "cuda") for kept in (frozenset[str](), everything))
    assert none.items["backbone shard"] == pytest.approx(whole / 4, rel=0.01)
    assert (none.items["resident parts"], all_of_it.items["resident parts"]) == (0, whole)
    assert none.items["gathered for use"] > 0 == all_of_it.items["gathered for use"]
    offloaded = plan_memory(plain, Sharding(4, offload=True), frozenset(), "cuda")
    assert none.total - offloaded.total == none.items["backbone shard"] == offloaded.host["backbone shard"]
    second = plan_memory(plain, Sharding(4, node_shards=2), frozenset(), "cuda")
    assert second.items["second shard (hpZ)"] == pytest.approx(whole / 2, rel=0.01)
    assert plan_memory(plain, Sharding(1), everything, "cuda").items["resident parts"] == 0


def test_sharding_is_read_from_deepspeeds_json(tiny_llama_folder: Path, tmp_path: Path) -> None:
    def sharding(preset: str, kind: str = "zero") -> Sharding:
        return read_sharding(
            recipe_of(tiny_llama_folder, engine={"kind": kind, "ds_config": preset}).engine, 16, "cuda"
        )

    assert sharding("zero3") == Sharding(16)
    assert sharding("zero3_offload") == Sharding(16, offload=True)
    assert sharding("zero3_hpz") == Sharding(16, node_shards=8)
    assert sharding("zero3", "local") == Sharding(1)


def test_ranks_of_one_machine_need_no_room_for_messages(
    tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(tiny_llama_folder, engine={"kind": "zero"})

    def sharding_with(**zero: object) -> Sharding:
        path = tmp_path / "asked.json"
        path.write_text(json.dumps({"zero_optimization": {"stage": 3} | zero}), encoding="utf-8")
        engine = recipe_of(tiny_llama_folder, engine={"kind": "zero", "ds_config": str(path)}).engine
        return read_sharding(engine, 2, "cpu")

    here = read_sharding(recipe.engine, 2, "cpu")
    assert here == Sharding(2, in_place=True)
    assert sharding_with(offload_param={"device": "cpu"}) == Sharding(2, offload=True, in_place=True)
    elsewhere = [
        read_sharding(recipe.engine, 2, "cpu", nodes=2),
        read_sharding(recipe.engine, 2, "cuda"),
        read_sharding(recipe.engine, 1, "cpu"),
        sharding_with(zero_hpz_partition_size=2),
    ]
    assert not any(one.in_place for one in elsewhere)
    monkeypatch.setenv("HYPERSCALE_SHARED_SHARDS", "0")
    assert not read_sharding(recipe.engine, 2, "cpu").in_place

    workload = describe_run(recipe, open_backbone(recipe.backbone))
    plans = [plan_memory(workload, sharding, frozenset(), "cpu") for sharding in (here, Sharding(2))]
    blocks = [part.nbytes for part in workload.parts if part.is_block]
    assert plans[0].items["gathered for use"] < plans[1].items["gathered for use"]
    assert plans[0].items["gathered for use"] >= max(blocks)


def received(recipe: Recipe) -> tuple[int, int]:
    """Return the bytes that this rank's third step gathered from the other, and what the plan says."""
    engine, corpus = engine_of(recipe), corpus_of(recipe)
    assert isinstance(engine, ZeroEngine)
    loader = loader_of(recipe, corpus, engine.collective.rank, 2)
    for step in range(2):
        engine.train_step(loader.next_step(), step)
    with logged_gathers(engine.model.backbone) as gathers:
        engine.train_step(loader.next_step(), 2)
    workload = describe_run(recipe, open_backbone(recipe.backbone))
    planned = plan_traffic(workload, Sharding(2), engine.resident, micro_batches=1)
    return sum(gather.received_bytes for gather in gathers), planned.gathers


def test_what_is_planned_is_what_arrives(two_ranks: Ranks, tiny_t5_folder: Path, tmp_path: Path) -> None:
    tasks = write_tasks(tmp_path)
    backbones = {
        "tied": tiny.tiny_llama(tmp_path / "tied"),
        "untied": tiny.tiny_llama(tmp_path / "untied", tie_word_embeddings=False),
        "t5": tiny_t5_folder,
        **{name: tiny.tiny_family(tmp_path / name, name) for name in ("gemma3_text", "umt5")},
    }
    for name, backbone in backbones.items():
        for resident in ("none",) if name in tiny.FAMILIES else ("none", "20KB", "all"):
            recipe = make_recipe(
                backbone,
                tasks,
                tmp_path,
                engine={"kind": "zero", "resident": resident},
                cluster={"workers": 2},
                training={"steps": 5, "batch_size": 8, "micro_batch_size": 4, "optimizer": {"warmup_steps": 1}},
            )
            (counted, planned), _ = two_ranks.run(received, recipe)
            # At most what is planned: a part that is still there when it is asked for again does not travel twice.
            assert 0.6 * planned <= counted <= 1.02 * planned, (name, resident, counted, planned)
            assert (planned == 0) == (resident == "all")


def test_operations_count_each_pass(tmp_path: Path) -> None:
    backbone = scale.write_config("LLaMA-3 8B", tmp_path)
    recipe = scale.recipe_of(backbone, 8)
    workload, shape = describe_run(recipe, open_shapes(recipe.backbone)), step_shape(recipe)
    blocks = sum(part.numel for part in workload.parts if part.is_block)
    once, again = (step_operations(workload, shape, way) for way in (False, True))
    assert again - once == 2 * blocks * 8 * (256 + 16)
    assert once == pytest.approx(4 * blocks * 8 * 272, rel=0.01)


@pytest.mark.long
def test_llama_70b_in_four_bits_fits_two_gpus_of_24_gib(tmp_path: Path) -> None:
    """A micro-batch of 1 × 2,048 tokens; either half of the memory saved is needed."""
    raw = scale.recipe_of(scale.write_config("LLaMA-3 70B", tmp_path), 2).model_dump(mode="json")
    raw["data"] |= {"max_source_tokens": 1792, "max_target_tokens": 256}
    raw["training"] |= {"batch_size": 16, "micro_batch_size": 1}
    raw["engine"] |= {"generated_budget": "0B"}
    totals = {}
    for quantization, offload in (("nf4_all", True), ("nf4", True), ("nf4_all", False)):
        raw["backbone"]["quantization"], raw["engine"]["offload_checkpoints"] = quantization, offload
        recipe = Recipe.model_validate(raw)
        workload = describe_run(recipe, open_shapes(recipe.backbone))
        totals[quantization, offload] = plan_memory(workload, Sharding(2), frozenset(), "cuda").total / 2**30
    assert totals["nf4_all", True] < 0.9 * 24
    assert totals["nf4_all", False] - totals["nf4_all", True] == pytest.approx(79 * 2048 * 8192 * 2 / 2**30, rel=0.05)
    assert min(totals["nf4", True], totals["nf4_all", False]) > 0.9 * 24


def write_recipe(folder: Path, backbone: Path) -> Path:
    path = folder / "recipe.yaml"
    raw = recipe_of(backbone).model_dump(mode="json") | {"output": str(folder / "run")}
    path.write_text(json.dumps(raw))
    return path


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_recipe(tmp_path, scale.write_config("LLaMA-3 8B", tmp_path))
    words = ("plan", path, "--gpus", 16, "--nodes", 2, "--bandwidth", 40, "--rate", 300, "engine.kind=zero")
    shown = run(capsys, *words, "--gpu-memory", "80GiB", "backbone.dtype=bfloat16")
    assert shown.code == 0, shown.err
    assert "8,030,261,248 frozen parameters in bfloat16" in shown.out
    assert "16 GPUs on 2 node(s)" in shown.out
    for item in ("backbone shard", "resident parts", "generated weights", "activations", "Ray on the node", "tokens/s"):
        assert item in shown.out
    assert "fits in 80.0 GiB" in shown.out

    plan = json.loads(run(capsys, *words, "--gpu-memory", "80GiB", "--json").out)
    assert plan["fits"] is True
    assert plan["memory"]["total"] == sum(plan["memory"]["items"].values()) <= 0.9 * 80 * 2**30
    assert plan["largest_micro_batch"] > 2
    assert plan["traffic"]["total"] == plan["traffic"]["gathers"] + plan["traffic"]["gradients"]

    tight = run(capsys, *words, "--gpu-memory", "3GiB")
    assert tight.code == 1
    assert "DOES NOT FIT in 3.0 GiB" in tight.out
    assert "to make it fit: " in tight.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus", "0"], "--gpus 0: must be more than 0"),
        (["--gpus", "8", "--nodes", "3"], "--nodes 3: 8 ranks cannot be spread evenly over them"),
        (["--gpu-memory", "lots"], "--gpu-memory: 'lots' is not an amount of memory: write a number and a unit"),
        (["engine.resident=some"], "'some' is not allowed: must be one of auto, none, all, or an amount of memory"),
    ],
)
def test_a_plan_that_cannot_be_made_is_an_error(
    tmp_path: Path, tiny_llama_folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    outcome = run(capsys, "plan", write_recipe(tmp_path, tiny_llama_folder), *words)
    assert outcome.code == 2
    assert message in outcome.err
    assert len(outcome.errors) == 1


def test_sizes() -> None:
    assert [parse_size(text) for text in ("500MiB", "2GiB", "80 GB", "1.5KiB", "7B")] == [
        *(500 * 2**20, 2 * 2**30, 80 * 10**9, 1536, 7),
    ]
    for text in ("", "12", "GiB", "-1GiB", "1XiB"):
        with pytest.raises(ValueError, match="is not an amount of memory"):
            parse_size(text)
    assert [format_size(size) for size in (7, 1536, 3 * 2**30)] == ["7 B", "1.5 KiB", "3.0 GiB"]


def test_the_documents_table_is_what_the_code_says() -> None:
    assert scale.between_marks(scale.DOCUMENT.read_text(encoding="utf-8")) == scale.table()
