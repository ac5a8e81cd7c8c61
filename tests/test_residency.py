"""Parts of the backbone stay gathered as the recipe asks, on two real ranks, and the step stays the same."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hyperscale.config.run import Recipe
from hyperscale.engine.collective import SingleProcess
from hyperscale.engine.deepspeed_names import is_away
from hyperscale.engine.ds_config import read_sharding
from hyperscale.engine.frozen_linear import forget_linear_inputs
from hyperscale.engine.host_memory import free_memory
from hyperscale.engine.residency import Residency, agree_on_resident
from hyperscale.engine.zero import ZeroEngine
from hyperscale.model.backbone import open_backbone
from hyperscale.planning.memory import describe_run, plan_memory
from hyperscale.planning.parts import Part, choose_resident
from tests.gathers import held_elements
from tests.ranks import Ranks
from tests.runs import CPU, corpus_of, engine_of, loader_of, make_recipe


def recipe(backbone: Path, tasks: list[str], output: Path, resident: str, **engine: Any) -> Recipe:
    settings = {"kind": "zero", "resident": resident, **engine}
    return make_recipe(backbone, tasks, output, engine=settings, cluster={"workers": 2})


def steps(chosen: Recipe) -> dict[str, Any]:
    """Train three steps, evaluate, train one more; what was held, gathered and lost on this rank."""
    engine, corpus = engine_of(chosen), corpus_of(chosen)
    assert isinstance(engine, ZeroEngine)
    loader = loader_of(chosen, corpus, engine.collective.rank, 2)
    held, losses = [held_elements(engine.model.backbone)], []
    for step in range(4):
        if step == 3:  # evaluation makes DeepSpeed forget the order of modules, and let go what it may
            with engine.evaluating():
                pass
            held.append(held_elements(engine.model.backbone))
        losses.append(engine.train_step(loader.next_step(), step).loss)
        held.append(held_elements(engine.model.backbone))
    gathered = [name for name, one in engine.model.backbone.named_parameters() if not is_away(one)]
    parts = {part.name: (part.numel, sum(-(-numel // 2) for numel in part.numels)) for part in engine.parts}
    inside = list(engine.model.backbone.modules())[1:]  # the whole model has one of DeepSpeed's engine besides
    hooks = [hook for module in inside for hook in module._forward_hooks.values()]
    return {
        "held": held,
        "losses": losses,
        "resident": engine.resident,
        "gathered": gathered,
        "parts": parts,
        "deepspeed_hooks": sum("deepspeed" in (getattr(hook, "__module__", None) or "") for hook in hooks),
    }


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_held_memory_matches_the_resident_setting(
    two_ranks: Ranks, request: pytest.FixtureRequest, tasks: list[str], tmp_path: Path, family: str, checkpointing: bool
) -> None:
    backbone = request.getfixturevalue(f"tiny_{family}_folder")

    def run(resident: str) -> dict[str, Any]:
        chosen = recipe(backbone, tasks, tmp_path, resident, activation_checkpointing=checkpointing)
        first, second = two_ranks.run(steps, chosen)
        assert first["resident"] == second["resident"]
        assert first["losses"] == second["losses"]
        assert set(first["held"]) == set(second["held"])
        shard = sum(share for _, share in first["parts"].values())
        kept = sum(first["parts"][name][0] for name in first["resident"])
        assert set(first["held"]) == {shard + kept}  # from loading on, after every step and evaluation
        return first

    none, everything, some = run("none"), run("all"), run("60KB")
    assert (none["resident"], none["gathered"]) == (frozenset(), [])
    assert everything["resident"] == frozenset(everything["parts"])
    assert 0 < len(some["resident"]) < len(some["parts"])
    assert 4 * sum(some["parts"][name][0] for name in some["resident"]) <= 60_000
    assert (everything["deepspeed_hooks"], some["deepspeed_hooks"] > 0, none["deepspeed_hooks"] > 0) == (0, True, True)
    assert some["losses"] == none["losses"]  # bitwise: the same products either way
    # Without DeepSpeed's hooks the gradients of T5's encoded text are added in another order.
    rounding = 1e-6 if family == "t5" else 0.0
    assert everything["losses"] == pytest.approx(none["losses"], rel=rounding, abs=0.0)


def agreed(chosen: Recipe, free: list[float]) -> tuple[Residency, int]:
    """Decide as a rank whose machine has other memory than its neighbour's."""
    import hyperscale.engine.residency as residency

    engine = engine_of(chosen.model_copy(update={"engine": chosen.engine.model_copy(update={"resident": "none"})}))
    assert isinstance(engine, ZeroEngine)
    collective = engine.collective
    before = residency.free_memory
    residency.free_memory = lambda _device: (int(free[collective.rank]), 0)
    try:
        folder = open_backbone(chosen.backbone)
        workload = partial(describe_run, chosen, folder)
        decision = agree_on_resident(chosen.engine, workload, engine.parts, collective, CPU)
    finally:
        residency.free_memory = before
    return decision, len(engine.parts)


def test_the_poorest_rank_decides(two_ranks: Ranks, tiny_llama_folder: Path, tasks: list[str], tmp_path: Path) -> None:
    chosen = recipe(tiny_llama_folder, tasks, tmp_path, "auto")
    (rich, parts), (poor, _) = two_ranks.run(agreed, chosen, [1e12, 1e12])
    assert len(rich.parts) == len(poor.parts) == parts
    assert not rich.returns_memory
    (rich, _), (poor, _) = two_ranks.run(agreed, chosen, [1e12, 1e6])
    assert rich == poor == Residency(frozenset(), returns_memory=True)

    # Room for the plan and all parts, but not for the plan once more: the plan is kept to.
    workload = describe_run(chosen, open_backbone(chosen.backbone))
    plan = plan_memory(workload, read_sharding(chosen.engine, 2, "cpu"), frozenset(), "cpu").total
    enough = 2 * (plan + sum(part.nbytes for part in workload.parts))  # for two ranks of one machine
    (tight, _), (roomy, _) = (two_ranks.run(agreed, chosen, [free] * 2)[0] for free in (enough, enough + 2 * plan))
    assert tight == Residency(all_names(workload.parts), returns_memory=True)
    assert roomy == Residency(all_names(workload.parts), returns_memory=False)


def all_names(parts: Sequence[Part]) -> frozenset[str]:
    return frozenset(part.name for part in parts)


def test_auto_on_this_machine(two_ranks: Ranks, tiny_llama_folder: Path, tasks: list[str], tmp_path: Path) -> None:
    first, second = two_ranks.run(steps, recipe(tiny_llama_folder, tasks, tmp_path, "auto"))
    assert first["resident"] == second["resident"] == frozenset(first["parts"])  # a tiny model fits everywhere


def test_free_memory_of_this_host() -> None:
    free, total = free_memory(CPU)
    assert 0 < free <= total


def test_a_budget_is_filled_in_order() -> None:
    norm, block, head, embedding = Part("norm", (8,), (2,), 8, 2, False), 1000, 70_000, 70_000
    blocks = [Part(f"layers.{index}", (block // 2, block // 2), (2, 2), block, 2, True) for index in range(3)]
    parts = [
        Part("embed", (embedding,), (2,), embedding, 1, False),
        *blocks,
        norm,
        Part("head", (head,), (2,), head, 2, False),
    ]
    assert choose_resident(parts, 0) == frozenset()
    assert choose_resident(parts, 16) == {"norm"}
    assert choose_resident(parts, 2 * 2000 + 16) == {"norm", "layers.0", "layers.1"}
    assert choose_resident(parts, 3 * 2000 + 16 + 140_000) == {one.name for one in parts} - {"embed"}
    assert choose_resident(parts, 1e9) == {one.name for one in parts}


@pytest.mark.parametrize("bias", [False, True])
def test_a_frozen_linear_keeps_nothing_of_its_weight(bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(6, 5, bias=bias).requires_grad_(False)
    x = torch.randn(2, 3, 6, requires_grad=True)
    expected = F.linear(x, linear.weight, linear.bias)
    (gradient,) = torch.autograd.grad(expected.square().sum(), x)

    forget_linear_inputs(linear)
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = linear(x)
    assert kept == []
    assert torch.equal(y, expected)
    assert torch.equal(torch.autograd.grad(y.square().sum(), x)[0], gradient)
    assert not linear(x.detach()).requires_grad


def test_one_rank_decides_alone(tiny_llama_folder: Path, tasks: list[str], tmp_path: Path) -> None:
    chosen = make_recipe(tiny_llama_folder, tasks, tmp_path, engine={"kind": "zero", "resident": "10KB"})
    parts = (Part("small", (100,), (4,), 100, 2, False), Part("large", (10_000,), (4,), 10_000, 2, True))
    workload = partial(describe_run, chosen, open_backbone(chosen.backbone))
    assert agree_on_resident(chosen.engine, workload, parts, SingleProcess(), CPU).parts == {"small"}
