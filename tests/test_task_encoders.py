"""Tasks known by number, and tasks known by what is written about them."""

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from hyperscale.config.adaptation import AdaptationSettings, TaskEncoderSettings
from hyperscale.config.backbone import BackboneSettings
from hyperscale.errors import ConfigError
from hyperscale.model.adapters.registry import build_kinds
from hyperscale.model.architectures import Architecture
from hyperscale.model.backbone import load_dense, open_backbone
from hyperscale.model.description import text_features
from hyperscale.model.generators.generator import keep_known_tasks, with_new_tasks
from hyperscale.model.generators.registry import build_generator, stored_features
from hyperscale.model.sites import SiteMap
from hyperscale.model.task_encoders.registry import TASK_ENCODERS
from hyperscale.model.weights import tensors_of
from tests import tiny

NUM_TASKS, WIDTH = 4, 24


def features(count: int = NUM_TASKS) -> Tensor:
    """Much alike, as pooled hidden states are."""
    random = torch.Generator().manual_seed(2)
    return 5 * torch.randn(WIDTH, generator=random) + 0.3 * torch.randn(count, WIDTH, generator=random)


def settings(generator: str, encoder: str = "text", **more: Any) -> AdaptationSettings:
    return AdaptationSettings.model_validate(
        {"generator": {"kind": generator}, "task_encoder": {"kind": encoder, "dim": 16}, **more}
    )


@pytest.fixture(scope="module")
def site_map(tiny_llama_folder: Path) -> SiteMap:
    return tiny.adapted_model(tiny_llama_folder).site_map


def build(chosen: AdaptationSettings, site_map: SiteMap, code: Tensor | None, num_tasks: int = NUM_TASKS) -> nn.Module:
    return build_generator(chosen, site_map, build_kinds(chosen.adapters), num_tasks, 0, code)


@pytest.mark.parametrize("generator", ["hypernetwork", "per_layer"])
def test_codes_are_a_projection_of_what_sets_the_descriptions_apart(generator: str, site_map: SiteMap):
    built = build(settings(generator), site_map, features())
    encoder = built.get_submodule("task_encoder")
    codes = encoder(torch.tensor([3, 1]))
    centre = features().mean(0)
    spread = (features() - centre).pow(2).mean().sqrt()
    for row, task in enumerate((3, 1)):
        expected = encoder.project.weight @ ((features()[task] - centre) / spread) + encoder.project.bias
        torch.testing.assert_close(codes[row], expected, rtol=1e-5, atol=1e-5)
    every = encoder(torch.arange(NUM_TASKS))
    assert 0.5 < every.std() < 1.5  # a table's are N(0, 1)
    assert torch.cdist(every, every)[~torch.eye(NUM_TASKS, dtype=torch.bool)].min() > 1

    tiny.disturb(built)
    weights = built(torch.arange(NUM_TASKS))
    sum(tensor.square().sum() for tensor in tensors_of(weights)).backward()
    assert encoder.project.weight.grad.any()
    assert not encoder.features.requires_grad
    for tensor in tensors_of(weights):
        assert not torch.equal(tensor[0], tensor[1])


@pytest.mark.parametrize("generator", ["hypernetwork", "per_layer"])
def test_features_travel_with_the_generator(generator: str, site_map: SiteMap):
    first = build(settings(generator), site_map, features())
    tiny.disturb(first)
    state = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    stored = stored_features(state)
    assert torch.equal(stored, features())
    again = build(settings(generator), site_map, stored)
    again.load_state_dict(state, strict=True)
    tasks = torch.tensor([2, 0])
    for one, other in zip(tensors_of(first(tasks)), tensors_of(again(tasks)), strict=True):
        assert torch.equal(one, other)
    assert stored_features(build(settings(generator, "table"), site_map, None).state_dict()) is None


def test_a_task_that_was_never_trained(site_map: SiteMap):
    generator = build(settings("hypernetwork"), site_map, features())
    tiny.disturb(generator)
    before = generator(torch.arange(NUM_TASKS))
    new = features(NUM_TASKS + 2)[NUM_TASKS:]
    ids = generator.task_encoder.append(torch.cat([new, features()[1:2]]))
    assert ids.tolist() == [4, 5, 6]
    for old, now in zip(tensors_of(before), tensors_of(generator(torch.arange(NUM_TASKS))), strict=True):
        assert torch.equal(old, now)  # the trained tasks are as they were
    for tensor in tensors_of(generator(torch.cat([ids, torch.tensor([1])]))):
        assert not torch.equal(tensor[0], tensor[1])
        torch.testing.assert_close(tensor[2], tensor[3], rtol=1e-6, atol=1e-6)  # the same words, the same task


def test_more_described_tasks_leave_the_known_ones_to_the_bit(site_map: SiteMap):
    known = build(settings("hypernetwork"), site_map, features())
    tiny.disturb(known)
    every = torch.cat([features(), features(NUM_TASKS + 2)[NUM_TASKS:]])
    more = build(settings("hypernetwork"), site_map, every, NUM_TASKS + 2)
    more.load_state_dict(with_new_tasks(more, known.state_dict()), strict=True)
    for one, other in zip(tensors_of(known(torch.arange(4))), tensors_of(more(torch.arange(4))), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(more.task_encoder.features, every)
    assert keep_known_tasks(more, NUM_TASKS) == {}


def test_missing_or_wrong_features_of_the_text_encoder_are_errors(site_map: SiteMap):
    with pytest.raises(ConfigError, match=r"^adaptation.task_encoder.kind 'text' needs features of the tasks'"):
        build(settings("hypernetwork"), site_map, None)
    with pytest.raises(ConfigError, match=r"features of shape \[4, 24\] for 3 tasks$"):
        build(settings("hypernetwork"), site_map, features(), num_tasks=3)


def test_every_task_encoder_of_the_recipe_is_built():
    (union, *_) = get_args(TaskEncoderSettings)
    assert {member.model_fields["kind"].default for member in get_args(union)} == set(TASK_ENCODERS)


def whole_features(backbone: Any, architecture: Architecture, ids: Tensor, mask: Tensor) -> Tensor:
    """Read all texts in one forward pass that keeps every hidden state."""
    inputs = {"input_ids": ids, "attention_mask": mask, "output_hidden_states": True}
    if architecture.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids[:, :1]
    output = backbone(**inputs)
    states = output.encoder_hidden_states if architecture.is_encoder_decoder else output.hidden_states
    return (states[-1] * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_descriptions_are_read_a_few_at_a_time(family: str, request: pytest.FixtureRequest):
    chosen = BackboneSettings(name=str(request.getfixturevalue(f"tiny_{family}_folder")), dtype="float32", dropout=0.1)
    folder = open_backbone(chosen)
    backbone = load_dense(folder, chosen)
    random = torch.Generator().manual_seed(0)
    lengths = torch.tensor([5, 3, 9, 4, 6, 2, 7, 1, 20, 12, 30])
    mask = (torch.arange(30) < lengths[:, None]).long()
    ids = torch.randint(3, 300, mask.shape, generator=random) * mask
    shapes = []

    def record(_backbone: nn.Module, _args: object, inputs: dict[str, Any], output: Any) -> None:
        shapes.append(tuple(inputs["attention_mask"].shape))
        assert output.get("hidden_states") is None

    handle = backbone.register_forward_hook(record, with_kwargs=True)
    actual = text_features(backbone, folder.architecture, ids, mask)
    handle.remove()
    assert shapes == [(8, 9), (3, 30)]
    assert backbone.training
    assert not backbone.get_submodule(folder.architecture.stacks[0].final_norm)._forward_hooks
    with torch.no_grad():
        expected = whole_features(backbone.eval(), folder.architecture, ids, mask)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
