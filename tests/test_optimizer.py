"""The generator's optimizer: which parameters move at which rate."""

from pathlib import Path

import pytest
import torch

from hyperscale.config.training import OptimizerSettings
from hyperscale.engine.optimizer import GeneratorOptimizer
from hyperscale.model.generators.roles import head_weights
from hyperscale.model.weights import tensors_of
from tests import tiny

RATE = 1e-3
RATIO = 1 / 16


def moved(
    folder: Path, kind: str, ratio: float, trunk: float = 1.0, **generator_settings: str
) -> dict[str, torch.Tensor]:
    """Return how far one step of equal gradients moves every parameter of a generator."""
    settings = {
        "generator": {"kind": kind, **generator_settings},
        "adapters": [{"kind": "lora", "rank": 2, "alpha": 2.0, "targets": ["q", "v"]}, {"kind": "norm_delta"}],
    }
    generator = tiny.adapted_model(folder, settings, 3).generator
    before = {name: parameter.detach().clone() for name, parameter in generator.named_parameters()}
    optimizer_settings = OptimizerSettings(
        learning_rate=RATE, warmup_steps=0, head_learning_rate_ratio=ratio, trunk_learning_rate_ratio=trunk
    )
    optimizer = GeneratorOptimizer(generator, optimizer_settings, total_steps=10)
    for parameter in generator.parameters():
        parameter.grad = torch.ones_like(parameter)
    assert optimizer.learning_rate(0) == pytest.approx(RATE)
    optimizer.clip()
    optimizer.step(0)
    return {name: parameter.detach() - before[name] for name, parameter in generator.named_parameters()}


@pytest.mark.parametrize("kind", ["hypernetwork", "per_layer"])
def test_the_weights_of_heads_have_a_rate_of_their_own(tiny_llama_folder: Path, kind: str):
    steps = moved(tiny_llama_folder, kind, RATIO)
    heads = {name for name in steps if ".heads." in f".{name}" and name.endswith("weight")}
    assert heads
    assert len(heads) < len(steps)
    for name, step in steps.items():
        expected = -RATE * (RATIO if name in heads else 1.0)
        torch.testing.assert_close(step, torch.full_like(step, expected), rtol=1e-3, atol=1e-7, msg=name)


@pytest.mark.parametrize(
    ("kind", "generator_settings"),
    [("hypernetwork", {}), ("hypernetwork", {"biases": "site", "heads": "position"}), ("per_layer", {})],
)
def test_parameters_that_make_codes_have_their_own_rate(
    tiny_llama_folder: Path, kind: str, generator_settings: dict[str, str]
):
    steps = moved(tiny_llama_folder, kind, 1.0, RATIO, **generator_settings)
    parts = ("task_encoder.", "layer_embedding.", "position_embedding.", "project.")
    makes_codes = {name for name in steps if any(part in name for part in parts)}
    expected_parts = parts if kind == "hypernetwork" else (parts[0], parts[-1])
    assert all(any(part in name for name in makes_codes) for part in expected_parts)
    for name, step in steps.items():
        expected = -RATE * (RATIO if name in makes_codes else 1.0)
        torch.testing.assert_close(step, torch.full_like(step, expected), rtol=1e-3, atol=1e-7, msg=name)


@pytest.mark.parametrize("kind", ["independent", "shared"])
def test_generators_without_heads_do_not_feel_it(tiny_llama_folder: Path, kind: str):
    plain, other = moved(tiny_llama_folder, kind, 1.0), moved(tiny_llama_folder, kind, RATIO, RATIO)
    for name, step in plain.items():
        assert torch.equal(step, other[name]), name


def test_a_generated_weight_moves_as_far_as_a_stored_one(tiny_llama_folder: Path):
    """At 1 / code_dim a step changes generated weights by about the learning rate; at 1 by code_dim times as much."""
    settings = {
        "generator": {"kind": "hypernetwork", "code_dim": 64},
        "adapters": [{"kind": "lora", "rank": 2, "alpha": 2.0, "targets": ["q", "v"]}],
    }
    changes = {}
    for ratio in (1.0, 1 / 64):
        generator = tiny.adapted_model(tiny_llama_folder, settings, 3).generator
        heads = head_weights(generator)
        for name, parameter in generator.named_parameters():
            parameter.requires_grad_(name in heads)
        optimizer = GeneratorOptimizer(
            generator, OptimizerSettings(learning_rate=RATE, warmup_steps=0, head_learning_rate_ratio=ratio), 10
        )
        before = torch.cat([tensor.flatten() for tensor in tensors_of(generator(torch.tensor([1])))])
        before.sum().backward()
        optimizer.clip()
        optimizer.step(0)
        after = torch.cat([tensor.flatten() for tensor in tensors_of(generator(torch.tensor([1])))])
        changes[ratio] = float((after - before).detach().abs().mean())
    assert changes[1.0] == pytest.approx(64 * changes[1 / 64], rel=0.01)
    assert 0.5 * RATE < changes[1 / 64] < RATE
