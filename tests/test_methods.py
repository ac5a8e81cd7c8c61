"""Every adapter kind with every generator on both families: batched generation and hooks against the plain formulas.

In float64, forward and gradient, in a batch of mixed tasks with padding. And what only some kinds have: the start of
each, norms in the backbone's precision, a prefix while decoding.
"""

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hyperscale.config.adaptation import AdaptationSettings
from hyperscale.export.module_tensors import tensors_by_module
from hyperscale.inference.decoding import greedy_decode
from hyperscale.model.adapted import AdaptedModel, label_positions, token_losses
from hyperscale.model.adapters.registry import build_kinds
from hyperscale.model.backbone import set_activation_checkpointing
from hyperscale.model.generators.generator import keep_known_tasks, with_new_tasks
from hyperscale.model.generators.registry import build_generator
from hyperscale.model.sites import is_norm
from hyperscale.model.weights import tensors_of
from tests import plain, tiny

NUM_TASKS = 3
GENERATORS: Mapping[str, dict[str, Any]] = {
    "hypernetwork": {"kind": "hypernetwork", "layer_dim": 5, "position_dim": 3, "hidden_dim": 11, "code_dim": 7},
    "joint": {"kind": "hypernetwork", "stacks": "joint", "hidden_dim": 11, "code_dim": 7},
    "by position": {"kind": "hypernetwork", "heads": "position", "hidden_dim": 11, "code_dim": 7},
    "biases by site": {"kind": "hypernetwork", "heads": "position", "biases": "site", "hidden_dim": 11, "code_dim": 7},
    "per_layer": {"kind": "per_layer", "hidden_dim": 11, "code_dim": 7},
    "independent": {"kind": "independent"},
    "shared": {"kind": "shared"},
}
ALL_PROJECTIONS = {
    "llama": ["q", "k", "v", "o", "gate", "up", "down"],
    "t5": ["q", "k", "v", "o", "cross_q", "cross_k", "cross_v", "cross_o", "wi_0", "wi_1", "wo"],
}
SCALED = {"llama": ["k", "v", "feed_forward"], "t5": ["k", "v", "cross_k", "cross_v", "feed_forward"]}


def adapters(kind: str, family: str) -> list[dict[str, Any]]:
    each = {
        "lora": {"kind": "lora", "rank": 2, "alpha": 5.0, "targets": ALL_PROJECTIONS[family]},
        "vera": {"kind": "vera", "rank": 5, "d_initial": 0.5, "projection_seed": 7},
        "bottleneck": {"kind": "bottleneck", "reduction": 8},
        "conditional norm": {"kind": "bottleneck", "reduction": 8, "layer_norm": True},
        "ia3": {"kind": "ia3", "targets": SCALED[family]},
        "norm_delta": {"kind": "norm_delta"},
        "prefix": {"kind": "prefix", "length": 3},
    }
    return [one for name, one in each.items() if name != "bottleneck"] if kind == "all" else [each[kind]]


KINDS = ("lora", "vera", "bottleneck", "conditional norm", "ia3", "norm_delta", "prefix", "all")
every_kind = pytest.mark.parametrize("kind", KINDS)
every_generator = pytest.mark.parametrize("generator", GENERATORS)


@pytest.fixture(scope="module", params=["llama", "t5"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def folder(request: pytest.FixtureRequest, family: str) -> Path:
    return request.getfixturevalue(f"tiny_{family}_folder")


def settings(kind: str, family: str, generator: str, **more: Any) -> AdaptationSettings:
    return AdaptationSettings.model_validate(
        {
            "generator": GENERATORS[generator],
            "task_encoder": {"kind": "table", "dim": 6},
            "adapters": adapters(kind, family),
            **more,
        }
    )


def model(folder: Path, chosen: AdaptationSettings, **backbone: Any) -> AdaptedModel:
    return tiny.adapted_model(folder, chosen.model_dump(), NUM_TASKS, **backbone)


def questions(adapted: AdaptedModel, rows: int = 4, length: int = 6) -> dict[str, Tensor]:
    """Rows of unlike lengths, padded on the right."""
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 300, (rows, length), generator=random)
    mask = (torch.arange(length) < torch.arange(length - rows + 1, length + 1).unsqueeze(1)).long()
    arguments = {"input_ids": ids, "attention_mask": mask}
    if adapted.architecture.is_encoder_decoder:
        arguments["decoder_input_ids"] = torch.randint(3, 300, (rows, 3), generator=random)
    return arguments


def logits(adapted: AdaptedModel, batch: Mapping[str, Tensor]) -> Tensor:
    return adapted.backbone(**batch, use_cache=False).logits


@pytest.mark.parametrize(("kind", "init"), [*((kind, "zero") for kind in KINDS), ("all", "paper")])
@every_generator
def test_batched_generation_and_hooks_are_the_plain_formulas(
    kind: str, init: str, generator: str, family: str, folder: Path
):
    chosen = settings(kind, family, generator, init=init)
    # transformers' plain attention takes its softmax in fp32, the fused one stays in float64
    ours, theirs = (model(folder, chosen, attention="sdpa") for _ in range(2))
    for adapted in (ours, theirs):
        adapted.generator.double()
        tiny.disturb(adapted.generator, std=0.2)
        adapted.backbone.double()
        adapted.dtype = torch.float64
        plain.exact_norms(adapted.backbone)
    plain.compare(ours, theirs, chosen, questions(ours), torch.tensor([2, 0, 1, 0]))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("prefix", "all")])
@pytest.mark.parametrize("generator", ["hypernetwork", "per_layer", "independent"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_step_0_is_exactly_the_untouched_backbone(kind: str, generator: str, dtype: str, family: str, folder: Path):
    adapted = model(folder, settings(kind, family, generator), dtype=dtype)
    batch, tasks = questions(adapted), torch.tensor([0, 2, 2, 0])
    untouched = logits(adapted, batch)
    with adapted.adapting(tasks):
        assert torch.equal(logits(adapted, batch), untouched)
    tiny.disturb(adapted.generator)
    with adapted.adapting(tasks):
        assert not torch.equal(logits(adapted, batch), untouched)


@every_generator
@pytest.mark.parametrize("init", ["zero", "paper"])
def test_every_head_learns_by_the_third_step(generator: str, init: str, family: str, folder: Path):
    adapted = model(folder, settings("all", family, generator, init=init))
    optimizer = torch.optim.AdamW(adapted.generator.parameters(), lr=2e-3)
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 300, (6, 8), generator=random)
    labels = torch.randint(3, 300, (6, 8), generator=random)
    positions, targets, _ = label_positions(labels, adapted.architecture.is_encoder_decoder)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        with adapted.adapting(torch.arange(6) % NUM_TASKS):
            logits = adapted.label_logits(ids, torch.ones_like(ids), labels, positions)
            loss = token_losses(logits, targets).mean()
            loss.backward()
        losses.append(loss.item())
        idle = {name for name, parameter in adapted.generator.named_parameters() if not parameter.grad.any()}
        optimizer.step()
    assert idle == set()
    assert losses[2] < losses[0]
    assert all(parameter.grad is None for parameter in adapted.backbone.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_norm_computes_with_another_weight(family: str, folder: Path, dtype: str):
    """To the last bit, and its own weight is the same again afterwards."""
    adapted = model(folder, settings("norm_delta", family, "independent"), dtype=dtype)
    tiny.disturb(adapted.generator, std=0.3)
    norms = {site.name: adapted.backbone.get_submodule(site.name) for site in adapted.site_map.sites}
    assert len(norms) == sum(is_norm(module) for module in adapted.backbone.modules())
    deltas = tensors_by_module(adapted.generator(torch.tensor([2])), adapted.site_map)
    for name, norm in norms.items():
        weight, x = norm.weight, torch.randn(4, 5, 32).to(adapted.dtype)
        plain_norm = deepcopy(norm)
        plain_norm._forward_pre_hooks.clear()
        plain_norm.weight.add_(deltas[name]["norm_delta"].to(adapted.dtype))
        with adapted.adapting(torch.tensor([0, 2, 1, 2])):
            assert torch.equal(norm(x)[1::2], plain_norm(x)[1::2])
        with adapted.adapting(torch.tensor([2])):
            assert torch.equal(norm(x), plain_norm(x))
        assert norm.weight is weight
        assert not torch.equal(norm(x), plain_norm(x))


def test_norms_belong_to_all_tasks_or_to_each(family: str, folder: Path):
    for generator, per_task, sets in (
        ("hypernetwork", None, 1),
        ("per_layer", None, 1),
        ("shared", None, 1),
        ("independent", None, NUM_TASKS),
        ("independent", False, 1),
        ("hypernetwork", True, NUM_TASKS),
    ):
        chosen = settings("all", family, generator)
        norm = {"kind": "norm_delta", "per_task": per_task}
        others = [one.model_dump() for one in chosen.adapters if one.kind != "norm_delta"]
        adapted = model(folder, AdaptationSettings.model_validate(chosen.model_dump() | {"adapters": [*others, norm]}))
        deltas = [tensor for name, tensor in adapted.generator.named_parameters() if "norm_delta" in name]
        assert {tensor.shape[0] for tensor in deltas} == {sets}
        sites = [site for site in adapted.site_map.sites if site.kind == "norm_delta"]
        assert sum(tensor[0].numel() for tensor in deltas) == 32 * len(sites)


@every_generator
def test_more_tasks_leave_the_known_ones_to_the_bit(generator: str, family: str, folder: Path):
    chosen = settings("all", family, generator)
    known = model(folder, chosen)
    tiny.disturb(known.generator)
    kinds, state = build_kinds(chosen.adapters), known.generator.state_dict()
    more = build_generator(chosen, known.site_map, kinds, NUM_TASKS + 2, seed=1)
    more.load_state_dict(with_new_tasks(more, state), strict=True)
    tasks = torch.arange(NUM_TASKS)
    for one, other in zip(tensors_of(known.generator(tasks)), tensors_of(more(tasks)), strict=True):
        assert torch.equal(one, other)
    rows = keep_known_tasks(more, NUM_TASKS)
    expected = {"independent": set(dict(more.named_parameters())), "shared": set()}
    embeddings = {"generated.task_encoder.embedding.weight"}
    assert rows.keys() == expected.get(generator, embeddings)
    assert {name for name, parameter in more.named_parameters() if parameter.requires_grad} == rows.keys()
    assert all(len(more.get_parameter(name)) == NUM_TASKS + 2 for name in rows)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("padded", [True, False])
def test_a_prefix_while_decoding(family: str, folder: Path, attention: str, padded: bool):
    """With a cache, token by token, as without one; a padded row of a mixed batch as that row alone."""
    adapted = model(folder, settings("prefix", family, "independent"), attention=attention)
    tiny.disturb(adapted.generator, std=0.3)
    batch, tasks = questions(adapted), torch.tensor([2, 0, 1, 0])
    ids, mask = batch["input_ids"], batch["attention_mask"]
    if not padded:
        mask = torch.ones_like(mask)
    elif not adapted.architecture.is_encoder_decoder:
        ids, mask = ids.flip(1), mask.flip(1)  # decoder-only prompts are padded on the left
    never, five = torch.tensor([-1]), torch.full((len(ids),), 5)
    with torch.no_grad():
        with adapted.adapting(tasks):
            cached = greedy_decode(adapted, ids, mask, five, never, bool)
        untouched = greedy_decode(adapted, ids, mask, five, never, bool)
        for row, task in enumerate(tasks):
            prompt = ids[row : row + 1, mask[row].bool()]
            with adapted.adapting(task.view(1)):
                assert torch.equal(tiny.recomputed(adapted, prompt, 5), cached[row])
    assert not torch.equal(cached, untouched)


def test_a_prefix_under_either_attention(family: str, folder: Path):
    outputs = []
    for attention in ("eager", "sdpa"):
        adapted = model(folder, settings("prefix", family, "independent"), attention=attention)
        for mask in (questions(adapted)["attention_mask"], torch.ones(4, 6, dtype=torch.int64)):
            batch = questions(adapted) | {"attention_mask": mask}
            with (
                torch.no_grad(),
                adapted.adapting(torch.tensor([2, 0, 1, 0])),
            ):
                real = logits(adapted, batch)
            outputs.append(real if adapted.architecture.is_encoder_decoder else real[mask.bool()])
    torch.testing.assert_close(outputs[0], outputs[2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs[1], outputs[3], rtol=1e-4, atol=1e-5)


@every_kind
def test_activation_checkpointing_changes_no_gradient(kind: str, family: str, folder: Path):
    def gradients(checkpointing: bool) -> list[Tensor]:
        adapted = model(folder, settings(kind, family, "hypernetwork"), dropout=0.1)
        tiny.disturb(adapted.generator)
        if checkpointing:
            set_activation_checkpointing(adapted.backbone)
        batch = questions(adapted)
        torch.manual_seed(0)
        with adapted.adapting(torch.tensor([2, 0, 1, 0])):
            logits(adapted, batch).square().sum().backward()
        return [parameter.grad for parameter in adapted.generator.parameters() if parameter.grad is not None]

    for one, other in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_nothing_acts_outside_and_hooks_can_be_removed(family: str, folder: Path):
    adapted = model(folder, settings("all", family, "hypernetwork"))
    tiny.disturb(adapted.generator)
    batch, tasks = questions(adapted), torch.tensor([0, 0, 1, 2])
    fresh = tiny.adapted_model(folder, {"adapters": [{"kind": "lora"}]})
    untouched = logits(fresh, batch)
    assert torch.equal(logits(adapted, batch), untouched)
    with adapted.adapting(tasks):
        assert not torch.equal(logits(adapted, batch), untouched)
    assert torch.equal(logits(adapted, batch), untouched)
    adapted.injection.remove()
    ours = (adapted.backbone, adapted.backbone.get_output_embeddings())  # tokens looked up together, label positions
    for module in adapted.backbone.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks or module in ours
    with adapted.adapting(tasks):
        assert torch.equal(logits(adapted, batch), untouched)
