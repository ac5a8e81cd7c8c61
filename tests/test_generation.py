"""Weights made at every site inside the recomputed blocks, against all of them made at once."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hyperscale.config.adaptation import (
    AdaptationSettings,
    AdapterSettings,
    BottleneckSettings,
    LoraSettings,
    NormDeltaSettings,
)
from hyperscale.config.run import Recipe
from hyperscale.model.adapted import AdaptedModel, label_positions, token_losses
from hyperscale.model.adapters.lora import Lora
from hyperscale.model.adapters.norm_delta import NormDelta
from hyperscale.model.adapters.registry import build_kinds
from hyperscale.model.backbone import open_backbone, set_activation_checkpointing
from hyperscale.model.build import Blueprint
from hyperscale.model.generation import EagerGeneration
from hyperscale.model.weights import tensors_of
from hyperscale.planning.generated import generated_bytes, generates_site_by_site
from hyperscale.planning.memory import describe_run
from tests import tiny
from tests.command import run
from tests.runs import make_recipe, write_tasks

KINDS: tuple[AdapterSettings, ...] = (
    BottleneckSettings(reduction=8, layer_norm=True),
    LoraSettings(rank=2, alpha=4.0, targets=("q", "v", "o")),
)
ROWS = (slice(0, 2), slice(2, 4), slice(4, 6))
SLOTS = torch.tensor([2, 0, 1, 0, 2, 1])


@pytest.fixture(params=["llama", "t5"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(f"tiny_{request.param}_folder")


def build(folder: Path, generator: dict[str, Any], kinds: tuple[AdapterSettings, ...] = KINDS) -> AdaptedModel:
    adapted = tiny.adapted_model(folder, {"adapters": kinds, "generator": generator}, num_tasks=3)
    adapted.backbone.double()
    adapted.generator.double()
    adapted.dtype = torch.float64
    tiny.disturb(adapted.generator)
    set_activation_checkpointing(adapted.backbone)
    return adapted


def batch_of(adapted: AdaptedModel, rows: slice) -> tuple[Tensor, ...]:
    ids = torch.randint(3, 300, (6, 9), generator=torch.Generator().manual_seed(0))[rows]
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    positions, targets, _ = label_positions(labels, adapted.architecture.is_encoder_decoder)
    return ids, mask, labels, positions, targets


def gradients(adapted: AdaptedModel) -> dict[str, Tensor]:
    """Return the gradients that three micro-batches leave behind."""
    adapted.generator.zero_grad()
    generation = adapted.generation(torch.arange(3))
    for rows in ROWS:
        ids, mask, labels, positions, targets = batch_of(adapted, rows)
        with adapted.training(generation, SLOTS[rows], 3):
            token_losses(adapted.label_logits(ids, mask, labels, positions), targets).sum().backward()
    generation.backward()
    return {name: one.grad for name, one in adapted.generator.named_parameters() if one.grad is not None}


@pytest.mark.parametrize(
    "generator",
    [
        {"kind": "hypernetwork"},
        {"kind": "hypernetwork", "heads": "position"},
        {"kind": "hypernetwork", "stacks": "joint"},
        {"kind": "hypernetwork", "heads": "position", "biases": "site"},
    ],
    ids=["shape", "position", "joint", "biases by site"],
)
@pytest.mark.parametrize("norms", [False, True])
def test_both_ways_give_equal_gradients(folder: Path, generator: dict[str, Any], norms: bool):
    adapted = build(folder, generator, (*KINDS, NormDeltaSettings()) if norms else KINDS)
    at_once = gradients(adapted)
    assert set(at_once) == {name for name, _ in adapted.generator.named_parameters()}
    adapted.site_by_site = True
    assert not isinstance(adapted.generation(torch.arange(3)), EagerGeneration)
    by_site = gradients(adapted)
    assert set(by_site) == set(at_once)
    for name, gradient in at_once.items():
        torch.testing.assert_close(by_site[name], gradient, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["independent", "shared", "per_layer"])
def test_generators_that_keep_more_than_they_make_do_it_at_once(folder: Path, kind: str):
    adapted = build(folder, {"kind": kind})
    generation = adapted.generator.site_by_site(torch.tensor([2, 0]))
    assert isinstance(generation, EagerGeneration)
    for one, other in zip(
        tensors_of(generation.weights), tensors_of(adapted.generator(torch.tensor([2, 0]))), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("by_site", [False, True])
@pytest.mark.parametrize("kind", ["shared", "hypernetwork"])
def test_one_set_of_weights_is_neither_copied_nor_taken_apart_by_sample(
    folder: Path, kind: str, by_site: bool, monkeypatch: pytest.MonkeyPatch
):
    """All of the generator `shared`, and the one set of norms beside any other."""
    adapted = build(folder, {"kind": kind}, (LoraSettings(rank=2, targets=("q", "v")), NormDeltaSettings()))
    adapted.site_by_site = by_site
    tiny.disturb(adapted.generator)
    dimensions: dict[type, set[int]] = {}
    for adapter in (Lora, NormDelta):
        apply = adapter.apply

        def record(self: Any, x: Tensor, y: Tensor, weights: Any, apply: Any = apply) -> Tensor:
            dimensions.setdefault(type(self), set()).add(max(tensor.dim() for tensor in weights.values()))
            return apply(self, x, y, weights)

        monkeypatch.setattr(adapter, "apply", record)
    tasks = torch.arange(3)
    generation = adapted.generation(tasks)
    stored = sum(parameter.nbytes for parameter in adapted.generator.parameters())
    if kind == "shared":
        assert generation.nbytes == stored
    ids, mask, labels, positions, _ = batch_of(adapted, slice(0, 6))
    with adapted.training(generation, SLOTS, 3):
        together = adapted.label_logits(ids, mask, labels, positions)
        together.sin().sum().backward()
    assert dimensions == {Lora: {2 if kind == "shared" else 3}, NormDelta: {1}}
    generation.backward()
    gradients = {name: one.grad.clone() for name, one in adapted.generator.named_parameters()}

    # The same as with a copy of the set for every task.
    adapted.generator.zero_grad()
    adapted.site_by_site = False
    copied = EagerGeneration(
        {
            group: {name: tensor.expand(3, *tensor.shape[1:]) for name, tensor in named.items()}
            for group, named in adapted.generator(tasks).items()
        }
    )
    with adapted.training(copied, SLOTS, 3):
        expected = adapted.label_logits(ids, mask, labels, positions)
        expected.sin().sum().backward()
    copied.backward()
    torch.testing.assert_close(together, expected, rtol=1e-12, atol=1e-12)
    for name, parameter in adapted.generator.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-9, atol=1e-10)


def test_answers_are_the_same(folder: Path):
    adapted = build(folder, {"kind": "hypernetwork"})
    ids, mask, labels, positions, _ = batch_of(adapted, slice(0, 6))
    logits = []
    for adapted.site_by_site in (False, True):
        with torch.no_grad(), adapted.adapting(SLOTS):
            logits.append(adapted.label_logits(ids, mask, labels, positions))
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-12, atol=1e-12)


def test_one_task_needs_no_copies_for_its_samples(folder: Path):
    adapted = build(folder, {"kind": "hypernetwork"})
    ids, mask, labels, positions, _ = batch_of(adapted, slice(0, 2))
    task = torch.tensor([1])
    with torch.no_grad():
        with adapted.adapting(task):
            expected = adapted.label_logits(ids, mask, labels, positions)
        adapted.site_by_site = True
        with adapted.training(adapted.generation(task), torch.zeros(2, dtype=torch.int64), 1):
            actual = adapted.label_logits(ids, mask, labels, positions)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def recipe_of(folder: Path, tasks: list[str], **engine: object) -> Recipe:
    return make_recipe(
        folder,
        tasks,
        folder / "never",
        adaptation={"adapters": [{"kind": "lora", "rank": 4, "targets": ["q", "v", "o"]}]},
        engine={"kind": "local", "activation_checkpointing": True} | engine,
    )


@pytest.mark.parametrize("per_task", [None, False, True])
@pytest.mark.parametrize("kind", ["hypernetwork", "independent", "shared"])
def test_weights_that_all_tasks_share_count_once(folder: Path, kind: str, per_task: bool | None):
    chosen = AdaptationSettings.model_validate(
        {
            "adapters": [{"kind": "lora", "rank": 2}, {"kind": "norm_delta", "per_task": per_task}],
            "generator": {"kind": kind},
        }
    )
    adapted = tiny.adapted_model(folder, chosen.model_dump(), num_tasks=3)
    size = generated_bytes(chosen, adapted.site_map, build_kinds(chosen.adapters), 3, 2)
    assert size == EagerGeneration(adapted.generator(torch.arange(3))).held_bytes(2)


def test_the_budget_decides_and_the_plan_shows_it(folder: Path, tmp_path: Path):
    tasks = write_tasks(tmp_path)
    roomy = recipe_of(folder, tasks)
    adapted = tiny.adapted_model(folder, roomy.adaptation.model_dump(), num_tasks=len(tasks))
    kinds = build_kinds(roomy.adaptation.adapters)
    weights = adapted.generator(torch.arange(len(tasks)))
    size = generated_bytes(roomy.adaptation, adapted.site_map, kinds, len(tasks), 4)
    assert size == EagerGeneration(weights).held_bytes(4) == 3 * sum(tensor.nbytes for tensor in tensors_of(weights))
    blueprint = Blueprint(adapted.architecture, kinds, adapted.site_map)

    def generates_by_site(**engine: Any) -> bool:
        settings = recipe_of(folder, tasks, **engine).engine
        return generates_site_by_site(settings, roomy.adaptation, blueprint, len(tasks), itemsize=4)

    assert not generates_by_site(generated_budget=f"{size}B")
    assert generates_by_site(generated_budget=f"{size - 1}B")
    assert not generates_by_site(generated_budget="0B", activation_checkpointing=False)

    backbone = open_backbone(roomy.backbone)
    whole, parts = (
        describe_run(one, backbone).trace for one in (roomy, recipe_of(folder, tasks, generated_budget="0B"))
    )
    assert parts.generated < whole.generated / 3
    assert parts.kept <= whole.kept


def test_the_plan_says_when_the_budget_would_help(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With shapes of which the generated weights are the largest part."""
    recipe = recipe_of(folder, write_tasks(tmp_path), generated_budget="64GiB").model_dump(mode="json")
    recipe["adaptation"]["adapters"] = [{"kind": "bottleneck", "reduction": 1}]
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    words = ("plan", tmp_path / "recipe.yaml", "--gpus", 1, "--gpu-memory", "1MiB", "engine.kind=zero")
    assert "to make it fit: engine.generated_budget=0B" in run(capsys, *words).out
    assert "generated_budget" not in run(capsys, *words, "engine.generated_budget=0B").out
    assert "generated_budget" not in run(capsys, *words, "engine.activation_checkpointing=false").out
    outcome = run(capsys, *words, "engine.generated_budget=some")
    assert outcome.code == 2
    assert "engine.generated_budget: 'some' is not allowed: must be an amount of memory such as 500MiB" in outcome.err
