"""Adapters in the backbone: exactly nothing at the start, one sample's own task each, gone when asked."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hyperscale.config.adaptation import AdapterSettings, BottleneckSettings, LoraSettings
from hyperscale.model.adapted import AdaptedModel, label_positions, token_losses
from hyperscale.model.adapters.registry import build_kinds
from hyperscale.model.backbone import set_activation_checkpointing
from hyperscale.model.generation import EagerGeneration
from tests import tiny

ADAPTERS: dict[str, tuple[AdapterSettings, ...]] = {
    "lora": (LoraSettings(rank=2),),
    "bottleneck": (BottleneckSettings(reduction=8),),
    "both": (BottleneckSettings(reduction=8), LoraSettings(rank=2, alpha=4.0, targets=("q", "v", "o"))),
}
every_adapter = pytest.mark.parametrize("adapters", ADAPTERS)


@pytest.fixture(scope="module", params=["llama", "t5"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(f"tiny_{request.param}_folder")


def model(folder: Path, adapters: str, generator: str = "hypernetwork", **backbone: object) -> AdaptedModel:
    return tiny.adapted_model(
        folder, {"adapters": ADAPTERS[adapters], "generator": {"kind": generator}}, num_tasks=3, **backbone
    )


def inputs(adapted: AdaptedModel, rows: int = 5, length: int = 9) -> dict[str, Tensor]:
    """Rows of unlike lengths, padded on the right."""
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 300, (rows, length), generator=random)
    mask = (torch.arange(length) < torch.arange(length - rows + 1, length + 1).unsqueeze(1)).long()
    arguments = {"input_ids": ids, "attention_mask": mask}
    if adapted.architecture.is_encoder_decoder:
        arguments["decoder_input_ids"] = torch.randint(3, 300, (rows, 4), generator=random)
    return arguments


def logits(adapted: AdaptedModel, batch: dict[str, Tensor]) -> Tensor:
    return adapted.backbone(**batch, use_cache=False).logits


def grad_of(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


@every_adapter
@pytest.mark.parametrize("generator", ["hypernetwork", "independent", "shared"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_step_0_is_exactly_the_untouched_backbone(folder: Path, adapters: str, generator: str, dtype: str):
    adapted = model(folder, adapters, generator, dtype=dtype)
    batch = inputs(adapted)
    untouched = logits(adapted, batch)
    with adapted.adapting(torch.tensor([0, 2, 0, 2, 2])):
        assert torch.equal(logits(adapted, batch), untouched)
    tiny.disturb(adapted.generator)
    with adapted.adapting(torch.tensor([0, 2, 0, 2, 2])):
        assert not torch.equal(logits(adapted, batch), untouched)


@every_adapter
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-7)])
def test_a_mixed_batch_is_each_sample_in_a_batch_of_its_task(
    folder: Path, adapters: str, dtype: torch.dtype, tolerance: float
):
    adapted = model(folder, adapters)
    adapted.backbone.to(dtype)
    adapted.generator.to(dtype)
    adapted.dtype = dtype
    # More would make attention so sharp that in fp32 the backbone's own rounding exceeds the tolerance.
    tiny.disturb(adapted.generator, std=0.02)
    batch = inputs(adapted)
    tasks = torch.tensor([2, 0, 1, 0, 2])
    with torch.no_grad():
        with adapted.adapting(tasks):
            mixed = logits(adapted, batch)
        alone = []
        for task in range(3):
            with adapted.adapting(torch.tensor([task])):
                alone.append(logits(adapted, batch))
    for row, task in enumerate(tasks.tolist()):
        assert (mixed[row] - alone[task][row]).abs().max() <= tolerance * mixed.abs().max()
        assert (mixed[row] - alone[(task + 1) % 3][row]).abs().max() > 1e-2  # the task matters


def test_tasks_differ_where_the_first_group_has_one_set_for_all(folder: Path):
    """The norms' one set [1, S, …] comes first; every sample still gets the LoRA of its own task."""
    adapters = [{"kind": "norm_delta"}, {"kind": "lora", "rank": 2}]
    adapted = tiny.adapted_model(folder, {"adapters": adapters}, num_tasks=3)
    tiny.disturb(adapted.generator, std=0.05)
    adapted.generator.register_forward_hook(lambda _generator, _tasks, weights: dict(reversed(weights.items())))
    batch, tasks = inputs(adapted), torch.tensor([2, 0, 1, 0, 2])
    first, *others = [len(next(iter(group.values()))) for group in adapted.generator(torch.arange(3)).values()]
    assert first == 1
    assert 3 in others
    with torch.no_grad():
        with adapted.adapting(tasks):
            mixed = logits(adapted, batch)
        alone = []
        for task in range(3):
            with adapted.adapting(torch.tensor([task])):
                alone.append(logits(adapted, batch))
    for row, task in enumerate(tasks.tolist()):
        torch.testing.assert_close(mixed[row], alone[task][row], rtol=1e-4, atol=1e-4)
        assert (mixed[row] - alone[(task + 1) % 3][row]).abs().max() > 1e-2


def test_each_site_gets_its_own_weights(folder: Path):
    """Every adapted layer, called by itself, is its adapters' composition with that site's weights: LoRA acts first."""
    adapted = model(folder, "both")
    tiny.disturb(adapted.generator)
    kinds = {kind.name: kind for kind in build_kinds(ADAPTERS["both"])}
    weights, slots = adapted.generator(torch.tensor([1, 0])), torch.tensor([1, 0, 0])
    places: dict[str, list[tuple[str, dict[str, Tensor]]]] = {}
    for group, sites in adapted.site_map.groups.items():
        for index, site in enumerate(sites):
            own = {name: tensor[slots, index] for name, tensor in weights[group].items()}
            places.setdefault(site.name, []).append((site.kind, own))
    shared = 0
    for name, here in places.items():
        layer = adapted.backbone.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        x = torch.randn(3, 4, layer.in_features, generator=torch.Generator().manual_seed(0))
        expected = layer(x)
        for kind, own in sorted(here, key=lambda place: list(kinds).index(place[0])):
            expected = kinds[kind].apply(x, expected, own)
        with adapted.training(EagerGeneration(weights), slots, 2):
            torch.testing.assert_close(layer(x), expected, rtol=0, atol=0)
        shared += len(here) == 2
    assert shared == sum(site.position == "o" for site in adapted.site_map.sites)


def test_hooks_are_inert_outside_and_can_be_removed(folder: Path):
    adapted = model(folder, "both")
    tiny.disturb(adapted.generator)
    batch, task = inputs(adapted), torch.tensor([1])
    untouched = logits(adapted, batch)
    with adapted.adapting(task):
        first = logits(adapted, batch)
        with adapted.adapting(torch.tensor([0])):
            assert not torch.equal(logits(adapted, batch), first)
        assert torch.equal(logits(adapted, batch), first)  # an inner `with` gives back the outer one's weights
    assert torch.equal(logits(adapted, batch), untouched)
    with pytest.raises(KeyError), adapted.adapting(task):
        raise KeyError
    assert torch.equal(logits(adapted, batch), untouched)

    names = {site.name for site in adapted.site_map.sites}
    hooked = {name for name, module in adapted.backbone.named_modules() if module._forward_hooks}
    assert hooked == names
    adapted.injection.remove()
    assert not any(module._forward_hooks for module in adapted.backbone.modules())
    with adapted.adapting(task):
        assert torch.equal(logits(adapted, batch), untouched)


@every_adapter
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_activation_checkpointing_changes_no_gradient(folder: Path, adapters: str, dropout: float):
    def gradients(checkpointing: bool) -> tuple[Tensor, list[Tensor]]:
        adapted = model(folder, adapters, dropout=dropout)
        tiny.disturb(adapted.generator)
        if checkpointing:
            set_activation_checkpointing(adapted.backbone)
        assert adapted.backbone.training is (checkpointing or dropout > 0)
        batch = inputs(adapted)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        labels = ids.masked_fill(mask == 0, -100)
        positions, targets, _ = label_positions(labels, adapted.architecture.is_encoder_decoder)
        torch.manual_seed(0)
        with adapted.adapting(torch.tensor([2, 0, 1, 0, 2])):
            loss = token_losses(adapted.label_logits(ids, mask, labels, positions), targets).sum()
            loss.backward()
        return loss.detach(), [grad_of(parameter) for parameter in adapted.generator.parameters()]

    plain, recomputed = gradients(False), gradients(True)
    assert torch.equal(plain[0], recomputed[0])
    for one, other in zip(plain[1], recomputed[1], strict=True):
        assert one.any()
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_gradients_of_micro_batches_meet_in_the_leaves(folder: Path):
    """Cutting the graph at the generated weights and sending the sum through once is backpropagation."""
    adapted = model(folder, "both")
    adapted.backbone.double()
    adapted.generator.double()
    adapted.dtype = torch.float64
    tiny.disturb(adapted.generator)
    batch = inputs(adapted, rows=6)
    tasks = torch.tensor([2, 0, 1, 0, 2, 1])

    def loss(rows: slice) -> Tensor:
        return logits(adapted, {name: tensor[rows] for name, tensor in batch.items()}).square().sum()

    def gradients(run: Any) -> list[Tensor]:
        adapted.generator.zero_grad()
        run()
        return [grad_of(parameter).clone() for parameter in adapted.generator.parameters()]

    def at_once() -> None:
        with adapted.adapting(tasks):
            loss(slice(0, 6)).backward()

    def in_parts() -> None:
        generation = adapted.generation(torch.arange(3))
        for rows in (slice(0, 2), slice(2, 4), slice(4, 6)):
            with adapted.training(generation, tasks[rows], 3):
                loss(rows).backward()
        assert not any(parameter.grad is not None for parameter in adapted.generator.parameters())
        generation.backward()

    whole = gradients(at_once)
    for one, other in zip(whole, gradients(in_parts), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
