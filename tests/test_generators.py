"""Generators against plain references: one task and one site at a time in float64, and parameter counts by formula."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from hyperscale.config.adaptation import AdaptationSettings, GeneratorSettings
from hyperscale.model.adapted import AdaptedModel, label_positions, token_losses
from hyperscale.model.adapters.registry import build_kinds
from hyperscale.model.architectures import ARCHITECTURES
from hyperscale.model.generators.generator import group_specs, num_parameters
from hyperscale.model.generators.registry import GENERATORS, build_generator
from hyperscale.model.sites import Site, find_sites
from hyperscale.model.weights import tensors_of
from tests import tiny

NUM_TASKS = 4
SIZES = {"layer_dim": 5, "position_dim": 3, "hidden_dim": 11, "code_dim": 7}
GENERATOR_SETTINGS: Mapping[str, dict[str, Any]] = {
    "hypernetwork": {"kind": "hypernetwork", **SIZES},
    "joint": {"kind": "hypernetwork", "stacks": "joint", **SIZES},
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
            "task_encoder": {"dim": 6},
            "adapters": [
                {"kind": "bottleneck", "reduction": 8},
                {"kind": "lora", "rank": 2, "alpha": 5.0, "targets": FAMILIES[family]},
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


def plain_site(
    kind: str, adapted: AdaptedModel, chosen: AdaptationSettings, task: int, site: Site
) -> dict[str, Tensor]:
    """Make one task's weights of one site from the generator's parameters, which are float64."""
    parameters = dict(adapted.generator.named_parameters())
    sites = adapted.site_map.sites
    specs = specs_of(adapted, chosen)[site.group]
    if kind in ("independent", "shared"):
        index = [other for other in sites if other.group == site.group].index(site)
        row = task if kind == "independent" else 0
        tables = {name: parameters[f"table.{site.group.replace('/', '__')}__{name}"] for name in specs}
        return {name: tables[name][row, index] * spec.scale for name, spec in specs.items()}
    part = [other for other in sites if kind == "joint" or other.stack == site.stack]
    root = f"stacks.{'joint' if kind == 'joint' else site.stack}"
    blocks = list(dict.fromkeys((other.stack, other.layer) for other in part))
    places = list(dict.fromkeys((other.kind, other.position) for other in part))
    code = torch.cat(
        [
            parameters["task_encoder.embedding.weight"][task],
            parameters[f"{root}.trunk.layer_embedding.weight"][blocks.index((site.stack, site.layer))],
            parameters[f"{root}.trunk.position_embedding.weight"][places.index((site.kind, site.position))],
        ]
    )
    project = f"{root}.trunk.project"
    code = (parameters[f"{project}.0.weight"] @ code + parameters[f"{project}.0.bias"]).clamp(min=0)
    code = parameters[f"{project}.2.weight"] @ code + parameters[f"{project}.2.bias"]
    code = (code - code.mean()) / (code.var(correction=0) + 1e-6).sqrt()
    code = code * parameters[f"{project}.3.weight"] + parameters[f"{project}.3.bias"]
    made = {}
    for name, spec in specs.items():
        head = f"{root}.heads.heads.{site.kind}_{name}_{'x'.join(map(str, spec.shape))}.linear"
        flat = parameters[f"{head}.weight"] @ code + parameters[f"{head}.bias"]
        made[name] = (flat * spec.scale).reshape(spec.shape)
    return made


@every_generator
@every_family
def test_one_batched_call_makes_what_each_site_makes_alone(kind: str, family: str, folders: dict[str, Path]):
    adapted, chosen = model(kind, family, folders), settings(kind, family)
    adapted.generator.double()
    tiny.disturb(adapted.generator, std=0.3)
    tasks = torch.tensor([2, 0, 3])
    made = adapted.generate(tasks)
    assert made.keys() == adapted.site_map.groups.keys()
    for group, sites in adapted.site_map.groups.items():
        for row, task in enumerate(tasks.tolist()):
            for index, site in enumerate(sites):
                expected = plain_site(kind, adapted, chosen, task, site)
                assert made[group].keys() == expected.keys()
                for name, tensor in expected.items():
                    torch.testing.assert_close(made[group][name][row, index], tensor, rtol=1e-12, atol=1e-12)
    for tensor in tensors_of(made):
        same = torch.equal(tensor[0], tensor[1])
        assert same is (kind == "shared")  # which does not look at the task


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
    made = adapted.generate(torch.arange(NUM_TASKS))
    for group, specs in specs_of(adapted, chosen).items():
        for name, spec in specs.items():
            tensor = made[group][name]
            assert tensor.shape == (NUM_TASKS, len(adapted.site_map.groups[group]), *spec.shape)
            if spec.start == "zero":
                assert not tensor.any()
            else:
                assert 0.6 < tensor.std() / spec.shape[-1] ** -0.5 < 1.5


@every_family
def test_no_parameter_of_independent_is_touched_by_two_tasks(family: str, folders: dict[str, Path]):
    adapted = model("independent", family, folders)
    sum(tensor.sum() for tensor in tensors_of(adapted.generate(torch.tensor([1])))).backward()
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
    slots = torch.arange(8) % NUM_TASKS
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        with adapted.adapted(adapted.generate(torch.arange(NUM_TASKS)), slots):
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
    per_task = sum(math.prod(spec.shape) for site in sites for spec in specs[site.group].values())
    if kind in ("independent", "shared"):
        return per_task * (NUM_TASKS if kind == "independent" else 1)
    total = NUM_TASKS * 6
    for stack in ("all",) if kind == "joint" else adapted.site_map.stacks:
        part = [site for site in sites if stack in ("all", site.stack)]
        layers, positions = {(site.stack, site.layer) for site in part}, {(site.kind, site.position) for site in part}
        heads = {(site.kind, name, spec.shape) for site in part for name, spec in specs[site.group].items()}
        total += len(layers) * 5 + len(positions) * 3
        total += (6 + 5 + 3 + 1) * 11 + (11 + 1) * 7 + 2 * 7
        total += sum((7 + 1) * math.prod(shape) for *_, shape in heads)
    return total


@every_generator
@every_family
def test_parameter_count(kind: str, family: str, folders: dict[str, Path]):
    adapted = model(kind, family, folders)
    assert num_parameters(adapted.generator) == by_formula(kind, adapted, settings(kind, family))


def on_real_shapes(backbone: type[nn.Module], config: Any, adaptation: dict[str, Any], num_tasks: int) -> int:
    with torch.device("meta"):
        shapes = backbone(config)
    chosen = AdaptationSettings.model_validate(adaptation)
    kinds = build_kinds(chosen.adapters)
    site_map = find_sites(shapes, ARCHITECTURES[config.model_type], kinds)
    return num_parameters(build_generator(chosen, site_map, kinds, num_tasks, seed=0))


def t5(width: int, layers: int, heads: int) -> T5Config:
    return T5Config(d_model=width, d_ff=4 * width, num_layers=layers, num_heads=heads)


@pytest.mark.parametrize(
    ("config", "published"), [(t5(768, 12, 12), 5_211_056), (t5(512, 6, 8), 2_415_776)], ids=["base", "small"]
)
def test_published_count_of_hyperformer_plus_plus(config: T5Config, published: int):
    """arXiv 2106.04489, reduction 32, 8 tasks: ours is theirs without layer norms."""
    width = config.d_model
    conditional_norms = 2 * 2 * (64 * width + width)  # γ and β heads of both stacks
    trained_norms = (2 * config.num_layers + 1 + 3 * config.num_layers + 1) * width
    ours = on_real_shapes(T5ForConditionalGeneration, config, {"adapters": [{"kind": "bottleneck"}]}, 8)
    assert ours == published - conditional_norms - trained_norms


def test_published_count_of_hyperloader():
    """arXiv 2407.01411, T5-base, 7 tasks: ours is theirs without layer norms, with biases in the LoRA heads."""
    norms = 2 * 2 * (64 * 768 + 768) + 62 * 768
    head_biases = 2 * 2 * 8 * 768
    unused_positions = 2 * 64  # they number the encoder's cross-attention too
    adapters = [{"kind": "bottleneck"}, {"kind": "lora", "targets": ["q", "v", "cross_q", "cross_v"]}]
    ours = on_real_shapes(T5ForConditionalGeneration, t5(768, 12, 12), {"adapters": adapters}, 7)
    assert ours == 6_784_368 - norms + head_biases - unused_positions


@pytest.mark.parametrize(
    ("kind", "expected"), [("hypernetwork", 734_464), ("independent", 3_225_600), ("shared", 460_800)]
)
def test_counts_on_the_packaged_backbone(kind: str, expected: int):
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=100,
    )
    assert on_real_shapes(LlamaForCausalLM, config, {"generator": {"kind": kind}}, 7) == expected


def test_every_generator_of_the_recipe_is_built():
    (union, *_) = get_args(GeneratorSettings)
    assert {member.model_fields["kind"].default for member in get_args(union)} == set(GENERATORS)
