"""Generators against plain references: one task and one site at a time in float64, and parameter counts by formula."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from hyperscale.config.adaptation import AdaptationSettings, GeneratorSettings
from hyperscale.model.adapted import AdaptedModel, label_positions, token_losses
from hyperscale.model.adapters.registry import build_kinds
from hyperscale.model.architectures import ARCHITECTURES
from hyperscale.model.generators.generator import group_specs, num_parameters
from hyperscale.model.generators.registry import GENERATORS, build_generator
from hyperscale.model.sites import Site, find_sites
from hyperscale.model.weights import tensors_of
from tests import plain, tiny

NUM_TASKS = 4
SIZES = {"layer_dim": 5, "position_dim": 3, "hidden_dim": 11, "code_dim": 7}
GENERATOR_SETTINGS: Mapping[str, dict[str, Any]] = {
    "hypernetwork": {"kind": "hypernetwork", **SIZES},
    "joint": {"kind": "hypernetwork", "stacks": "joint", **SIZES},
    "by position": {"kind": "hypernetwork", "heads": "position", **SIZES},
    "biases by site": {"kind": "hypernetwork", "biases": "site", **SIZES},
    "per_layer": {"kind": "per_layer", "hidden_dim": 11, "code_dim": 7},
    "independent": {"kind": "independent"},
    "shared": {"kind": "shared"},
}
FAMILIES = {"llama": ("q", "v", "down"), "t5": ("q", "cross_v", "wo")}
every_generator = pytest.mark.parametrize("kind", GENERATOR_SETTINGS)
every_family = pytest.mark.parametrize("family", FAMILIES)


def settings(kind: str, family: str) -> AdaptationSettings:
    return AdaptationSettings.model_validate(
        {
            "generator": GENERATOR_SETTINGS[kind],
            "task_encoder": {"kind": "table", "dim": 6},
            "adapters": [
                {"kind": "bottleneck", "reduction": 8},
                {"kind": "lora", "rank": 2, "alpha": 5.0, "targets": FAMILIES[family]},
                {"kind": "prefix", "length": 2},
            ],
        }
    )


@pytest.fixture(scope="module")
def folders(tiny_llama_folder: Path, tiny_t5_folder: Path) -> dict[str, Path]:
    return {"llama": tiny_llama_folder, "t5": tiny_t5_folder}


def model(kind: str, family: str, folders: Mapping[str, Path]) -> AdaptedModel:
    return tiny.adapted_model(folders[family], settings(kind, family).model_dump(), NUM_TASKS)


def specs_of(adapted: AdaptedModel, chosen: AdaptationSettings) -> Mapping[str, Any]:
    return group_specs(adapted.site_map, build_kinds(chosen.adapters))


@every_generator
@every_family
def test_one_batched_call_makes_what_each_site_makes_alone(kind: str, family: str, folders: dict[str, Path]):
    adapted, chosen = model(kind, family, folders), settings(kind, family)
    adapted.generator.double()
    tiny.disturb(adapted.generator, std=0.3)
    tasks = torch.tensor([2, 0, 3])
    weights = adapted.generator(tasks)
    assert weights.keys() == adapted.site_map.groups.keys()
    for group, sites in adapted.site_map.groups.items():
        for row, task in enumerate(tasks.tolist()):
            for index, site in enumerate(sites):
                expected = plain.weights(adapted, chosen, task, site)
                assert weights[group].keys() == expected.keys()
                for name, tensor in expected.items():
                    own = weights[group][name]
                    torch.testing.assert_close(own[row % len(own), index], tensor, rtol=1e-12, atol=1e-12)
    for tensor in tensors_of(weights):
        assert len(tensor) == (1 if kind == "shared" else len(tasks))
        assert kind == "shared" or not torch.equal(tensor[0], tensor[1])


@every_generator
@every_family
def test_the_same_seed_gives_the_same_generator(kind: str, family: str, folders: dict[str, Path]):
    site_map, chosen = model(kind, family, folders).site_map, settings(kind, family)
    kinds = build_kinds(chosen.adapters)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = build_generator(chosen, site_map, kinds, NUM_TASKS, seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)  # nobody else's random numbers are moved
    torch.manual_seed(6)
    again = build_generator(chosen, site_map, kinds, NUM_TASKS, seed=3)
    other = build_generator(chosen, site_map, kinds, NUM_TASKS, seed=4)
    assert all(map(torch.equal, first.parameters(), again.parameters()))
    assert not all(map(torch.equal, first.parameters(), other.parameters()))
    assert {parameter.dtype for parameter in first.parameters()} == {torch.float32}
    # what a checkpoint keeps is the parameters: sites' numbers come from the site map
    assert first.state_dict().keys() == dict(first.named_parameters()).keys()


@every_generator
@every_family
def test_start(kind: str, family: str, folders: dict[str, Path]):
    """What must be zero is exactly zero for every task; the rest has the scale of its fan-in."""
    adapted, chosen = model(kind, family, folders), settings(kind, family)
    weights = adapted.generator(torch.arange(NUM_TASKS))
    for group, specs in specs_of(adapted, chosen).items():
        for name, spec in specs.items():
            tensor = weights[group][name]
            num_sets = 1 if kind == "shared" else NUM_TASKS
            assert tensor.shape == (num_sets, len(adapted.site_map.groups[group]), *spec.shape)
            if spec.start == "zero":
                assert not tensor.any()
            else:
                assert 0.6 < tensor.std() / spec.shape[-1] ** -0.5 < 1.5


@pytest.mark.parametrize("kind", ["hypernetwork", "per_layer", "independent"])
@torch.no_grad()
def test_published_start(kind: str, folders: dict[str, Path]):
    """Of a bottleneck with and without norm, and of LoRA; on the widths of the tiny backbone."""
    adapters = [
        {"kind": "bottleneck", "reduction": 2, "layer_norm": kind != "independent"},
        {"kind": "lora", "rank": 8, "targets": ["q", "v"]},
    ]
    chosen = AdaptationSettings.model_validate({"generator": {"kind": kind}, "adapters": adapters, "init": "paper"})
    adapted = tiny.adapted_model(folders["llama"], chosen.model_dump(), NUM_TASKS)
    tensors = {
        f"{group.split('/')[1]} {name}": tensor
        for group, named in adapted.generator(torch.arange(NUM_TASKS)).items()
        for name, tensor in named.items()
    }
    assert not tensors["lora b"].any()
    if kind == "independent":
        for name in ("down", "up"):
            weights = tensors[f"bottleneck {name}"]
            assert 0.8e-3 < weights.std() < 0.95e-3  # a normal cut at two deviations has 0.88 of its deviation
            assert weights.abs().max() <= 2e-3
            assert not tensors[f"bottleneck {name}_bias"].any()
        assert tensors["lora a"].abs().max() <= 32**-0.5
        assert tensors["lora a"].std() == pytest.approx((32 * 3) ** -0.5, rel=0.1)
        return
    heads = {name: parameter for name, parameter in adapted.generator.named_parameters() if "heads." in name}
    assert not any(name.endswith("bias") and parameter.any() for name, parameter in heads.items())
    assert not any("lora" in name and name.endswith("bias") for name in heads)
    for name, parameter in heads.items():
        if "bottleneck" in name and name.endswith("weight"):
            assert parameter.std() == pytest.approx(0.01, rel=0.1)
        if "lora" in name and ("__a" in name or "_a_" in name):
            assert parameter.abs().max() <= 1 / 8
            assert parameter.std() == pytest.approx(1 / 8 / 3**0.5, rel=0.05)
    if kind == "hypernetwork":  # codes of 64 have rms 1: 0.01 · 8
        for name in ("down", "up", "gamma", "beta"):
            assert tensors[f"bottleneck {name}"].pow(2).mean().sqrt() == pytest.approx(0.08, rel=0.3)


@pytest.mark.parametrize(
    ("generator", "layer_norm", "published"),
    [("hypernetwork", True, (0.1, 0.125)), ("per_layer", True, (1e-4, 2e-3)), ("independent", False, (1e-6, 1e-4))],
)
@pytest.mark.parametrize("init", ["zero", "paper"])
@torch.no_grad()
def test_what_a_bottleneck_adds_at_the_start(
    generator: str, layer_norm: bool, published: tuple[float, float], init: str, tiny_t5_folder: Path
):
    """To an input of rms 1: by default nothing; published, HyperFormer++ adds √(γ² + β²) ≈ 0.11, the others little."""
    adapters = [{"kind": "bottleneck", "reduction": 4, "layer_norm": layer_norm}]
    adaptation = {"generator": {"kind": generator}, "adapters": adapters, "init": init}
    adapted = tiny.adapted_model(tiny_t5_folder, adaptation, NUM_TASKS)
    (kind,) = build_kinds(AdaptationSettings.model_validate(adaptation).adapters)
    y = torch.randn(NUM_TASKS, 50, 32, generator=torch.Generator().manual_seed(0))
    squares = [
        (kind.apply(y, y, {name: tensor[:, index] for name, tensor in named.items()}) - y).pow(2).mean()
        for group, named in adapted.generator(torch.arange(NUM_TASKS)).items()
        for index in range(len(adapted.site_map.groups[group]))
    ]
    assert len(squares) == 8
    rms = float(torch.stack(squares).mean().sqrt())
    low, high = published if init == "paper" else (0, 0)
    assert low <= rms <= high


@every_family
def test_no_parameter_of_independent_is_touched_by_two_tasks(family: str, folders: dict[str, Path]):
    adapted = model("independent", family, folders)
    sum(tensor.sum() for tensor in tensors_of(adapted.generator(torch.tensor([1])))).backward()
    for parameter in adapted.generator.parameters():
        assert parameter.grad[1].all()
        assert not parameter.grad[[0, 2, 3]].any()


@every_generator
@every_family
def test_everything_learns_by_the_third_step(kind: str, family: str, folders: dict[str, Path]):
    adapted = model(kind, family, folders)
    optimizer = torch.optim.AdamW(adapted.generator.parameters(), lr=1e-2)
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 300, (8, 10), generator=random)
    labels = torch.randint(3, 300, (8, 10), generator=random)
    positions, targets, _ = label_positions(labels, adapted.architecture.is_encoder_decoder)
    tasks = torch.arange(8) % NUM_TASKS
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        with adapted.adapting(tasks):
            logits = adapted.label_logits(ids, torch.ones_like(ids), labels, positions)
            loss = token_losses(logits, targets).mean()
            loss.backward()
        losses.append(loss.item())
        idle = {name for name, parameter in adapted.generator.named_parameters() if not parameter.grad.any()}
        optimizer.step()
    assert idle == set()
    assert losses[2] < losses[1] < losses[0]
    assert all(parameter.grad is None for parameter in adapted.backbone.parameters())


def by_formula(kind: str, adapted: AdaptedModel, chosen: AdaptationSettings) -> int:
    """Count parameters from shapes alone."""
    sites, specs = adapted.site_map.sites, specs_of(adapted, chosen)

    def per_task_of(part: Sequence[Site]) -> int:
        return sum(math.prod(spec.shape) for site in part for spec in specs[site.group].values())

    per_task = per_task_of(sites)
    if kind in ("independent", "shared"):
        return per_task * (NUM_TASKS if kind == "independent" else 1)
    total = NUM_TASKS * 6
    if kind == "per_layer":
        return total + (6 + 1) * 11 + (11 + 1) * 7 + (7 + 1) * per_task
    positions = {(site.kind, site.position) for site in sites}  # numbered alike in all stacks
    for stack in ("all",) if kind == "joint" else adapted.site_map.stacks:
        part = [site for site in sites if stack in ("all", site.stack)]
        layers = {(site.stack, site.layer) for site in part}
        heads = {
            (site.kind, site.position if kind == "by position" else "", name, spec.shape)
            for site in part
            for name, spec in specs[site.group].items()
        }
        total += len(layers) * 5 + len(positions) * 3
        total += (6 + 5 + 3 + 1) * 11 + (11 + 1) * 7 + 2 * 7
        total += sum(7 * math.prod(shape) for *_, shape in heads)
        total += per_task_of(part) if kind == "biases by site" else sum(math.prod(shape) for *_, shape in heads)
    return total


@every_generator
@every_family
def test_parameter_count(kind: str, family: str, folders: dict[str, Path]):
    adapted = model(kind, family, folders)
    assert num_parameters(adapted.generator) == by_formula(kind, adapted, settings(kind, family))


def on_real_shapes(backbone: type[nn.Module], config: Any, adaptation: dict[str, Any], num_tasks: int) -> int:
    chosen = AdaptationSettings.model_validate(adaptation)
    kinds = build_kinds(chosen.adapters)
    with torch.device("meta"):
        site_map = find_sites(backbone(config), ARCHITECTURES[config.model_type], kinds)
        return num_parameters(build_generator(chosen, site_map, kinds, num_tasks, seed=0))


def t5(width: int, layers: int, heads: int) -> T5Config:
    return T5Config(vocab_size=32_128, d_model=width, d_ff=4 * width, num_layers=layers, num_heads=heads)


T5_BASE, T5_SMALL = t5(768, 12, 12), t5(512, 6, 8)


def hyperformer(reduction: int = 32, generator: str = "hypernetwork", init: str = "zero") -> dict[str, Any]:
    bottleneck = {"kind": "bottleneck", "reduction": reduction, "layer_norm": True}
    return {"generator": {"kind": generator}, "adapters": [bottleneck, {"kind": "norm_delta"}], "init": init}


@pytest.mark.parametrize(
    ("config", "adaptation", "published"),
    [
        (T5_BASE, hyperformer(), 5_211_056),
        (T5_BASE, hyperformer(reduction=16), 10_006_496),
        (T5_SMALL, hyperformer(), 2_415_776),
        (T5_BASE, hyperformer(generator="per_layer"), 122_343_744),
    ],
    ids=["++ base", "++ base, reduction 16", "++ small", "per layer, base"],
)
@pytest.mark.parametrize("init", ["zero", "paper"])
def test_published_count_of_hyperformer(config: T5Config, adaptation: dict[str, Any], init: str, published: int):
    """arXiv 2106.04489, 8 tasks: whatever the start."""
    assert on_real_shapes(T5ForConditionalGeneration, config, adaptation | {"init": init}, 8) == published


def test_published_count_of_hyperloader():
    """arXiv 2407.01411, T5-base, 7 tasks; a zero start keeps what makes it so in biases of the LoRA heads."""
    lora = {"kind": "lora", "targets": ["q", "v", "cross_q", "cross_v"]}
    adaptation = hyperformer(init="paper")
    adaptation["adapters"].append(lora)
    assert on_real_shapes(T5ForConditionalGeneration, T5_BASE, adaptation, 7) == 6_784_368
    head_biases = 2 * (8 * 768 + 768 * 8)
    zero = on_real_shapes(T5ForConditionalGeneration, T5_BASE, adaptation | {"init": "zero"}, 7)
    assert zero == 6_784_368 + head_biases


def test_count_of_houlsby():
    """arXiv 1902.00751 on T5-base: two bottlenecks of 64 a block and the layer norms, for each of 8 tasks."""
    adapters = [{"kind": "bottleneck", "reduction": 12}, {"kind": "norm_delta"}]
    adaptation = {"generator": {"kind": "independent"}, "adapters": adapters}
    per_task = 24 * 2 * (2 * 768 * 64 + 768 + 64) + 62 * 768
    assert on_real_shapes(T5ForConditionalGeneration, T5_BASE, adaptation, 8) == 8 * per_task


@pytest.mark.parametrize(
    ("kind", "targets", "expected"),
    [
        ("hypernetwork", ["q", "v"], 734_464),
        ("independent", ["q", "v"], 3_225_600),
        ("shared", ["q", "v"], 460_800),
        ("hypernetwork", "all", 2_332_224),
        ("shared", "all", 30 * 8 * (2 * (576 + 576) + 2 * (576 + 192) + 3 * (576 + 1536))),
    ],
)
def test_counts_on_the_packaged_backbone(kind: str, targets: str | list[str], expected: int):
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=100,
    )
    adaptation = {"generator": {"kind": kind}, "adapters": [{"kind": "lora", "rank": 8, "targets": targets}]}
    assert on_real_shapes(LlamaForCausalLM, config, adaptation, 7) == expected


def test_every_generator_of_the_recipe_is_built():
    (union, *_) = get_args(GeneratorSettings)
    assert {member.model_fields["kind"].default for member in get_args(union)} == set(GENERATORS)
