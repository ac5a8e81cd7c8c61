"""Checkpoints in host memory: what leaves the device, and that nothing else changes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hyperscale.config.loading import load_recipe
from hyperscale.config.run import Recipe
from hyperscale.errors import ConfigError
from hyperscale.model import checkpoints
from hyperscale.model.adapted import AdaptedModel
from hyperscale.model.backbone import open_backbone, set_activation_checkpointing
from hyperscale.planning.memory import Sharding, describe_run, plan_memory
from tests import tiny
from tests.runs import make_recipe


def gradients(model: AdaptedModel) -> list[Tensor]:
    ids = torch.randint(3, 200, (3, 11), generator=torch.Generator().manual_seed(5))
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.architecture.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids[:, :5]
    with model.adapting(torch.tensor([0, 1, 1])):
        model.backbone(**inputs, use_cache=False).logits.square().mean().backward()
    return [parameter.grad.clone() for parameter in model.generator.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_gradients_are_the_same(family: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """Here the copies lie beside the originals: there is no device to leave."""
    folder = request.getfixturevalue(f"tiny_{family}_folder")
    adapters = {"adapters": [{"kind": "lora", "rank": 2, "targets": ["q", "v"]}]}
    copies: list[torch.Size] = []

    def copied(tensor: Tensor) -> Tensor:
        copies.append(tensor.shape)
        return tensor.detach().clone()

    both = []
    for offload in (False, True):
        model = tiny.adapted_model(folder, adapters, num_tasks=2)
        tiny.disturb(model.generator)
        set_activation_checkpointing(model.backbone, offload)
        if offload:
            monkeypatch.setattr(checkpoints, "_stays", lambda tensor: not tensor.requires_grad)
            monkeypatch.setattr(checkpoints, "_copied", copied)
        both.append(gradients(model))
        assert checkpoints.bytes_on_host(model.backbone) == 0, "all of them have been used"
    blocks = sum(len(model.backbone.get_submodule(stack.blocks)) for stack in model.architecture.stacks)
    first = len(model.architecture.stacks)  # the input of a stack's first block needs no gradient
    assert len(copies) >= blocks - first
    assert set(copies) <= {(3, 11, 32), (3, 5, 32)}
    assert len(both[0]) == len(both[1]) > 0
    for one, other in zip(*both, strict=True):
        assert torch.equal(one, other)


def test_the_plan_moves_the_inputs_of_all_blocks_but_the_first(tiny_llama_folder: Path, tmp_path: Path):
    plans = []
    for offload in (False, True):
        engine = {"kind": "zero", "activation_checkpointing": True, "offload_checkpoints": offload}
        base = make_recipe(tiny_llama_folder, ["first", "second"], tmp_path).model_dump(mode="json")
        cluster = base["cluster"] | {"gpus_per_worker": 1}
        recipe = Recipe.model_validate(base | {"engine": base["engine"] | engine, "cluster": cluster})
        workload = describe_run(recipe, open_backbone(recipe.backbone))
        plans.append((workload.trace, plan_memory(workload, Sharding(2), frozenset(), "cuda")))
    (before, _), (after, plan) = plans
    data, rows = recipe.data, recipe.training.micro_batch_size
    one_input = rows * (data.max_source_tokens + data.max_target_tokens) * 32 * 4
    assert after.on_host == before.kept - after.kept == one_input
    assert dict(plan.host) == {"checkpoints": one_input}


def test_only_gpus_can_send_checkpoints_away():
    for change in ("engine.offload_checkpoints=true", "engine.activation_checkpointing=true"):
        changes = [change, "engine.offload_checkpoints=true"]
        with pytest.raises(ConfigError, match=r"engine\.offload_checkpoints .* needs engine\.activation_checkpointing"):
            load_recipe("demo", changes)
