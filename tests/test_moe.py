"""Mixtures of experts: attention adapts, experts and routers stay frozen, whoever is chosen on which rank."""

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hyperscale.config.adaptation import AdaptationSettings
from hyperscale.config.backbone import BackboneSettings
from hyperscale.config.run import Recipe
from hyperscale.engine.base import StepResult
from hyperscale.engine.frozen_experts import forget_expert_weights
from hyperscale.engine.zero import ZeroEngine
from hyperscale.errors import BackboneError, ConfigError
from hyperscale.export.peft_format import write_peft
from hyperscale.inference.decoding import greedy_decode
from hyperscale.model.adapted import AdaptedModel
from hyperscale.model.architectures import architecture_of
from hyperscale.model.backbone import build_empty, load_dense, open_backbone, open_shapes
from hyperscale.model.checkpoint_files import fill_parameters
from hyperscale.model.sites import is_norm
from hyperscale.planning.memory import Sharding, describe_run, plan_memory, step_shape
from hyperscale.planning.traffic import plan_traffic, step_operations
from hyperscale.run.plan import PlanOptions, plan_recipe, render_text
from tests import tiny
from tests.gathers import logged_gathers
from tests.ranks import Ranks
from tests.runs import corpus_of, engine_of, loader_of, make_recipe
from tests.test_zero_matches_local import (
    Trained,
    assert_same_training,
    gathered,
    loading_error,
    recipes,
    train,
)

WINDOW = 6
EXPERTS = 32
# With so few tokens in a micro-batch, no rank needs every expert.
FAMILIES: dict[str, dict[str, object]] = {
    "qwen3_moe": {
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "head_dim": 12,
        "norm_topk_prob": True,
        "num_hidden_layers": 3,
        "mlp_only_layers": [1],  # one block has a feed-forward network without experts
    },
    "mixtral": {
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "intermediate_size": 16,
        "sliding_window": WINDOW,
    },
    "gpt_oss": {
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "intermediate_size": 16,
        "head_dim": 12,
        "sliding_window": WINDOW,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
}
FEW = {"num_experts": 4, "num_local_experts": 4}
"""Experts of a model in which every expert is chosen."""
NORMS = {"kind": "norm_delta"}
LORA = {"kind": "lora", "rank": 2, "alpha": 5.0, "targets": ["q", "k", "v", "o"]}
PREFIX = {"kind": "prefix", "length": 3}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_family(tmp_path_factory.mktemp("experts") / family, family, **FAMILIES[family])


def adapted_model(folder: Path, *adapters: Mapping[str, Any], **backbone: Any) -> AdaptedModel:
    return tiny.adapted_model(folder, {"adapters": list(adapters)}, num_tasks=3, **backbone)


def questions(rows: int = 3, length: int = 14) -> dict[str, Tensor]:
    """Rows of unlike lengths, longer than a window."""
    ids = torch.randint(3, 230, (rows, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, length - 4 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def logits_of(backbone: Any, **inputs: Any) -> Tensor:
    logits: Tensor = backbone(**inputs, use_cache=False).logits
    return logits


# What transformers computes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_step_0_is_transformers_own_with_each_of_its_experts(family: str, folder: Path, dtype: torch.dtype):
    name = str(dtype).removeprefix("torch.")
    adapted = adapted_model(folder, LORA, NORMS, dtype=name)
    tiny_rows, tasks = questions(), torch.tensor([0, 2, 1])
    for experts in ("eager", "grouped_mm", "batched_mm"):
        model_class = getattr(transformers, architecture_of(family).model_class)
        own = model_class.from_pretrained(
            folder, dtype=dtype, attn_implementation="eager", experts_implementation=experts
        )
        adapted.backbone.set_experts_implementation(experts)
        with adapted.adapting(tasks):
            assert torch.equal(logits_of(adapted.backbone, **tiny_rows), logits_of(own, **tiny_rows)), experts


def test_the_table_names_every_layer(family: str, folder: Path):
    backbone = adapted_model(folder, LORA).backbone
    (stack,) = architecture_of(family).stacks
    named = {*stack.projections.values(), *stack.norms.values(), *stack.untouched}
    for block in backbone.get_submodule(stack.blocks).children():
        layers = {name for name, one in block.named_modules() if isinstance(one, nn.Linear) or is_norm(one)}
        assert {*stack.projections.values(), *stack.norms.values()} <= layers <= named
        # What is left of its parameters belongs to the experts, their router and gpt-oss's sinks.
        rest = {name for name, _ in block.named_parameters() if name.rpartition(".")[0] not in layers}
        experts = f"{stack.experts.path}."
        assert {one for one in rest if not one.startswith(experts)} <= {
            *("mlp.gate.weight", "mlp.router.weight", "mlp.router.bias", "self_attn.sinks")
        }
        assert any(one.startswith(experts) for one in rest) or "mlp.up_proj" in layers


def test_experts_and_routers_cannot_be_adapted(family: str, folder: Path):
    shown = r"cannot be used on a \w+ backbone \(its experts and their router are frozen; adapt attention: "
    for target in ("gate", "up", "down", "router"):
        with pytest.raises(ConfigError, match=rf"lora target '{target}' {shown}q, k, v, o\)"):
            adapted_model(folder, {"kind": "lora", "targets": ["q", target]})
    with pytest.raises(ConfigError, match=rf"bottleneck target 'feed_forward' {shown}attention\)"):
        adapted_model(folder, {"kind": "bottleneck"})
    with pytest.raises(ConfigError, match=rf"ia3 target 'feed_forward' {shown}"):
        adapted_model(folder, {"kind": "ia3"})
    whole = adapted_model(folder, {"kind": "lora", "targets": "all"})
    assert {site.position for site in whole.site_map.sites} == {"q", "k", "v", "o"}


def test_every_norm_and_projection_learns(family: str, folder: Path):
    adapted = adapted_model(folder, LORA, NORMS, PREFIX, {"kind": "bottleneck", "targets": ["attention"]})
    tiny.disturb(adapted.generator, std=0.1)
    with adapted.adapting(torch.tensor([0, 1, 2])):
        logits = adapted.backbone(**questions(), use_cache=False).logits
        logits.square().mean().backward()
    assert all(one.grad is not None and one.grad.abs().max() > 0 for one in adapted.generator.parameters())
    assert not any(one.requires_grad for one in adapted.backbone.parameters())


def test_auxiliary_losses_are_off(folder: Path):
    """They would train a router, and it is frozen."""
    adapted = adapted_model(folder, LORA)
    outputs = adapted.backbone(**questions(), labels=questions()["input_ids"], use_cache=False)
    assert outputs.aux_loss is None
    assert outputs.router_logits is None


def test_decoding_with_a_cache_is_recomputing(folder: Path):
    """Past the sliding window too."""
    adapted = adapted_model(folder, LORA, NORMS)
    tiny.disturb(adapted.generator)
    prompts, tasks, most = questions(length=9)["input_ids"], torch.tensor([0, 2, 1]), 8
    with adapted.adapting(tasks), torch.no_grad():
        answers = greedy_decode(
            adapted, prompts, torch.ones_like(prompts), torch.full((3,), most), torch.tensor([10**6]), anyone=bool
        )
        whole = prompts
        for _ in range(most):
            following = logits_of(adapted.backbone, input_ids=whole)[:, -1].argmax(-1, keepdim=True)
            whole = torch.cat([whole, following], dim=1)
    assert torch.equal(answers, whole[:, prompts.shape[1] :])
    assert len({tuple(row) for row in answers.tolist()}) == 3


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")
@pytest.mark.parametrize("adapter", [LORA, {"kind": "ia3", "targets": ["k", "v"]}], ids=["lora", "ia3"])
def test_peft_computes_the_same(family: str, folder: Path, tmp_path: Path, adapter: dict[str, Any]):
    adapted = adapted_model(folder, adapter)
    tiny.disturb(adapted.generator, std=0.2)
    rows = questions()
    with adapted.adapting(torch.tensor([1])):
        expected = logits_of(adapted.backbone, **rows)
    weights = adapted.generator(torch.tensor([1]))
    settings = AdaptationSettings.model_validate({"adapters": [adapter]}).adapters
    write_peft(tmp_path, weights, adapted.site_map, adapted.architecture, str(folder), torch.float32, settings)
    own = getattr(transformers, adapted.architecture.model_class).from_pretrained(folder, attn_implementation="eager")
    got = logits_of(PeftModel.from_pretrained(own, tmp_path).eval(), **rows)
    assert (got - expected).abs().max() <= (1e-6 if adapter is LORA else 1e-5)  # (IA)³ rounds 1 + δ, then multiplies
    assert (expected - logits_of(adapted.backbone, **rows)).abs().max() > 1e-2


# Files


def test_parameters_are_joined_as_transformers_joins_them(family: str, folder: Path):
    """Checkpoints hold qwen3_moe's and mixtral's experts matrix by matrix."""
    settings = BackboneSettings(name=str(folder), dtype="float32")
    opened = open_backbone(settings)
    empty, loaded = build_empty(opened, settings), load_dense(opened, settings)
    fill_parameters(empty, opened.files, opened.stored_as)
    expected = dict(loaded.named_parameters())
    assert all(torch.equal(tensor, expected[name]) for name, tensor in empty.named_parameters())
    pieces = {name: opened.stored_as(name) for name in expected if ".experts." in name}
    most = 1 if family == "gpt_oss" else 2 * EXPERTS
    assert max(map(len, pieces.values())) == most
    assert {one for names in pieces.values() for one in names} <= opened.tensor_names


def test_each_rank_reads_its_part_of_the_experts(two_ranks: Ranks, family: str, folder: Path):
    settings = BackboneSettings(name=str(folder), dtype="bfloat16")
    expected = dict(load_dense(open_backbone(settings), settings).named_parameters())
    for weights in two_ranks.run(gathered, folder, "bfloat16"):
        assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


def test_an_incomplete_checkpoint_is_named(two_ranks: Ranks, tmp_path: Path):
    folder = tiny.tiny_family(tmp_path / "whole", "mixtral", **FAMILIES["mixtral"] | FEW)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.block_sparse_moe.experts.3.w3.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for message in two_ranks.run(loading_error, folder):
        assert re.search(r"holds 6 matrices of experts, .* do not make the \[4, 32, 32\] of config.json", message), (
            message
        )


def test_a_quantized_checkpoint_is_an_error(folder: Path, tmp_path: Path):
    """As gpt-oss is published: its experts in MXFP4."""
    copy = Path(shutil.copytree(folder, tmp_path / "mxfp4"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))
    settings = BackboneSettings(name=str(copy))
    for opened in (open_backbone, open_shapes):
        with pytest.raises(BackboneError, match=r"are quantized already \(mxfp4\); give a checkpoint .* in bf16"):
            opened(settings)


def test_fused_attention_without_sinks_is_an_error(family: str, folder: Path):
    if family == "gpt_oss":
        with pytest.raises(BackboneError, match=r"fused kernel 'sdpa' cannot compute the attention of gpt_oss"):
            adapted_model(folder, LORA, attention="sdpa")
    else:
        assert adapted_model(folder, LORA, attention="sdpa").backbone.config._attn_implementation == "sdpa"


# Ranks


@dataclass(frozen=True)
class Routed:
    """One rank's training, and which experts its tokens took in the last step."""

    trained: Trained
    chosen: dict[str, frozenset[int]]
    """Name of a router -> numbers of the experts."""


def train_and_route(recipe: Recipe) -> Routed:
    engine, corpus = engine_of(recipe), corpus_of(recipe)
    loader = loader_of(recipe, corpus, engine.collective.rank, engine.collective.world_size)
    chosen: dict[str, set[int]] = {}
    routers = {name: one for name, one in engine.model.backbone.named_modules() if "TopKRouter" in type(one).__name__}
    for name, router in routers.items():

        def note(_router: nn.Module, _args: Any, output: tuple[Tensor, ...], name: str = name) -> None:
            chosen.setdefault(name, set()).update(output[2].flatten().tolist())

        router.register_forward_hook(note)
    engine.train_step(loader.next_step(), 0)
    experts = {name: frozenset(numbers) for name, numbers in chosen.items()}
    return Routed(train(recipe), experts)


WAYS: dict[str, dict[str, dict[str, Any]]] = {
    "plain": {},
    "checkpointed": {"engine": {"activation_checkpointing": True, "resident": "none"}},
    "int8": {"backbone": {"quantization": "int8"}},
}


@pytest.mark.parametrize(
    "way", ["plain", *(pytest.param(way, marks=pytest.mark.long) for way in ("checkpointed", "int8"))]
)
def test_ranks_whose_tokens_take_other_experts_equal_one_process(
    two_ranks: Ranks, folder: Path, tasks: list[str], tmp_path: Path, way: str
):
    """Blocks are gathered whole, so that no rank waits for an expert that another does not need."""
    adaptation = {"adapters": [LORA, NORMS]}
    training = {
        "steps": 3 if way == "plain" else 5,
        "batch_size": 4,
        "micro_batch_size": 1,
        "optimizer": {"warmup_steps": 1},
    }
    changes = {"adaptation": adaptation, "training": training, **WAYS[way]}
    sharded, alone = recipes(folder, tasks, tmp_path, changes)
    first, second = two_ranks.run(train_and_route, sharded)
    assert_same_training(first.trained, second.trained, train(alone))
    assert set(first.trained.held) == set(second.trained.held) == {first.trained.shard}
    assert first.chosen.keys() == second.chosen.keys() != set()
    pairs = [(experts, second.chosen[router]) for router, experts in first.chosen.items()]
    assert all(one != other for one, other in pairs)
    assert any(one - other for one, other in pairs)
    assert any(other - one for one, other in pairs)


def received(recipe: Recipe) -> tuple[StepResult, int, int]:
    engine, corpus = engine_of(recipe), corpus_of(recipe)
    assert isinstance(engine, ZeroEngine)
    loader = loader_of(recipe, corpus, engine.collective.rank, 2)
    for step in range(2):
        engine.train_step(loader.next_step(), step)
    with logged_gathers(engine.model.backbone) as gathers:
        result = engine.train_step(loader.next_step(), 2)
    workload = describe_run(recipe, open_backbone(recipe.backbone))
    planned = plan_traffic(workload, Sharding(2), engine.resident, micro_batches=1)
    return result, sum(gather.received_bytes for gather in gathers), planned.gathers


def test_gathers_count_the_experts(two_ranks: Ranks, folder: Path, tasks: list[str], tmp_path: Path):
    recipe = make_recipe(
        folder,
        tasks,
        tmp_path,
        adaptation={"adapters": [LORA]},
        engine={"kind": "zero", "resident": "none"},
        cluster={"workers": 2},
        training={"steps": 5, "batch_size": 8, "micro_batch_size": 4, "optimizer": {"warmup_steps": 1}},
    )
    (_, counted, planned), _ = two_ranks.run(received, recipe)
    assert 0.9 * planned <= counted <= 1.02 * planned, (counted, planned)
    (stack,) = architecture_of(open_shapes(recipe.backbone).config.model_type).stacks
    backbone = build_empty(open_backbone(recipe.backbone), recipe.backbone)
    experts = sum(one.nbytes for name, one in backbone.named_parameters() if f".{stack.experts.path}." in name)
    assert counted >= 0.95 * experts  # half of them, forward and backward


def test_a_gathered_block_is_let_go_between_the_passes(folder: Path):
    """What autograd keeps of the experts is where it lies, and the products are transformers' own."""
    adapted = adapted_model(folder, LORA)
    tiny.disturb(adapted.generator)
    batch, tasks = questions(), torch.tensor([0, 2, 1])

    def run() -> tuple[Tensor, list[Tensor], set[int]]:
        kept: list[Tensor] = []
        keeping = torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one, lambda one: one)
        with keeping, adapted.adapting(tasks):
            logits = adapted.backbone(**batch, use_cache=False).logits
        gradients = torch.autograd.grad(logits.square().sum(), list(adapted.generator.parameters()))
        return logits, list(gradients), {one.untyped_storage().data_ptr() for one in kept}

    experts = {
        one.untyped_storage().data_ptr() for name, one in adapted.backbone.named_parameters() if ".experts." in name
    }
    for implementation in ("grouped_mm", "eager"):
        adapted.backbone.set_experts_implementation(implementation)
        logits, gradients, kept = run()
        assert kept & experts
        forget_expert_weights(adapted.backbone, adapted.architecture)
        again, same, kept = run()
        assert not kept & experts
        assert torch.equal(again, logits)
        assert all(map(torch.equal, same, gradients))
        for block in adapted.backbone.get_submodule(adapted.architecture.stacks[0].blocks).children():
            for module in block.modules():
                vars(module).pop("forward", None)


# The plan


def test_the_plan_counts_the_experts(family: str, folder: Path, tasks: list[str], tmp_path: Path):
    recipe = make_recipe(folder, tasks, tmp_path, adaptation={"adapters": [LORA]}, engine={"kind": "zero"})
    workload = describe_run(recipe, open_shapes(recipe.backbone))
    backbone = build_empty(open_backbone(recipe.backbone), recipe.backbone)
    (stack,) = architecture_of(family).stacks
    experts = sum(one.numel() for name, one in backbone.named_parameters() if f".{stack.experts.path}." in name)
    blocks = [part for part in workload.parts if part.is_block]
    assert sum(part.expert_numel for part in blocks) == experts > 0
    assert sum(part.numel for part in workload.parts) == sum(one.numel() for one in backbone.parameters())
    # The largest block, with all its experts, is gathered with the next one in flight.
    memory = plan_memory(workload, Sharding(2, in_place=True), frozenset(), "cpu")
    assert memory.items["gathered for use"] >= max(part.nbytes for part in blocks)
    assert memory.items["backbone shard"] >= 4 * experts / 2
    # A token is multiplied with the chosen experts alone.
    dense = sum(part.numel for part in blocks) - experts
    shape = step_shape(recipe)
    tokens = shape.rows * (shape.source_tokens + shape.target_tokens)
    once, again = (step_operations(workload, shape, way) for way in (False, True))
    assert again - once == pytest.approx(2 * tokens * (dense + experts * 2 / EXPERTS))


@pytest.mark.parametrize("family", ["gpt_oss"], indirect=True)
def test_the_plan_says_what_quantization_leaves_out(family: str, folder: Path, tasks: list[str], tmp_path: Path):
    options = PlanOptions(gpus=2, nodes=1, gpu_memory=2**34, bandwidth=None, rate=None)
    plans = {}
    for quantization in ("none", "int8"):
        recipe = make_recipe(
            folder,
            tasks,
            tmp_path,
            backbone={"name": str(folder), "dtype": "bfloat16", "quantization": quantization},
            adaptation={"adapters": [LORA]},
            engine={"kind": "zero"},
            cluster={"workers": 2},
        )
        plans[quantization] = plan_recipe(recipe, options)
        shown = render_text(plans[quantization], recipe)
        assert "parameters compute a token" in shown
        assert ("does not cover the experts: they stay in bfloat16" in shown) is (quantization == "int8")
    plain, int8 = plans["none"], plans["int8"]
    assert plain.expert_bytes == int8.expert_bytes > 0
    assert int8.memory.items["backbone shard"] > int8.expert_bytes / 2
    assert int8.memory.items["backbone shard"] < plain.memory.items["backbone shard"]
    assert int8.backbone_parameters > int8.active_parameters
