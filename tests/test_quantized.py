"""A backbone whose blocks are stored as 8-bit integers: how far from the original, and the same everywhere."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hyperscale.config.backbone import BackboneSettings
from hyperscale.model.backbone import build_empty, load_dense, open_backbone
from hyperscale.model.quantized.int8 import Int8Linear, quantize
from hyperscale.planning.parts import find_parts


@pytest.fixture(params=["llama", "t5"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(f"tiny_{request.param}_folder")


def settings(folder: Path, **fields: str) -> BackboneSettings:
    return BackboneSettings.model_validate({"name": str(folder), "dtype": "float32", "quantization": "int8"} | fields)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_weight_moves_by_more_than_half_a_scale(dtype: torch.dtype):
    weight = torch.randn(37, 64, generator=torch.Generator().manual_seed(0)).mul_(0.05).to(dtype)
    weight[5] = 0
    weight[6, 0] = 40.0
    q, scale = quantize(weight)
    assert (q.dtype, scale.dtype) == (torch.int8, dtype)
    assert q.abs().max() <= 127
    error = (weight.double() - q.double() * scale.double().unsqueeze(1)).abs()
    assert (error <= scale.double().unsqueeze(1) / 2 * (1 + 1e-6)).all()
    exact = weight.double().abs().amax(1) / 127
    assert (scale.double() >= exact * (1 - 1e-6)).all()
    assert (scale[exact > 0].double() <= exact[exact > 0] * (1 + 2**-7)).all(), "no wider than rounding asks"
    assert torch.equal(q[5], torch.zeros(64, dtype=torch.int8))


@pytest.mark.parametrize("bias", [False, True])
def test_output_and_gradient_are_those_of_the_stored_weight(bias: bool):
    linear = nn.Linear(24, 10, bias=bias).requires_grad_(False)
    stored = Int8Linear(linear, *quantize(linear.weight))
    assert not any(one.requires_grad for one in stored.parameters())
    whole = stored.weight.double() * stored.weight_scale.double().unsqueeze(1)
    x = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(1), requires_grad=True)
    other = x.detach().double().requires_grad_()
    y = stored(x)
    expected = other @ whole.T + (linear.bias.double() if bias else 0.0)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(stored(x.detach()), y.detach(), rtol=0, atol=0)
    gradient = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    y.backward(gradient)
    expected.backward(gradient.double())
    assert x.grad is not None
    assert other.grad is not None
    torch.testing.assert_close(x.grad.double(), other.grad, rtol=1e-5, atol=1e-6)


def test_nothing_of_the_weight_waits_for_the_backward_pass():
    linear = nn.Linear(64, 64, bias=False).requires_grad_(False)
    stored = Int8Linear(linear, *quantize(linear.weight))
    kept: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        stored(torch.randn(2, 64, requires_grad=True)).sum()
    assert not any(tensor.numel() >= 64 for tensor in kept)


def test_the_blocks_are_stored_so_and_nothing_else(folder: Path):
    backbone = open_backbone(settings(folder))
    plain, stored = load_dense(backbone, settings(folder, quantization="none")), load_dense(backbone, settings(folder))
    empty = build_empty(backbone, settings(folder))
    originals = dict(plain.named_modules())
    stacks = tuple(f"{stack.blocks}." for stack in backbone.architecture.stacks)
    for name, module in stored.named_modules():
        inside = name.startswith(stacks)
        assert isinstance(module, Int8Linear) == (inside and isinstance(originals[name], nn.Linear)), name
        if isinstance(module, Int8Linear):
            q, scale = quantize(originals[name].weight)
            assert torch.equal(module.weight, q)
            assert torch.equal(module.weight_scale, scale)
    shapes = [(name, one.shape, one.dtype, one.requires_grad) for name, one in stored.named_parameters()]
    assert [(name, one.shape, one.dtype, one.requires_grad) for name, one in empty.named_parameters()] == shapes
    assert all(one.is_meta for one in empty.parameters())


def test_the_quantized_model_gives_almost_the_same_logits(folder: Path):
    backbone = open_backbone(settings(folder))
    ids = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if backbone.architecture.is_encoder_decoder else {})
    with torch.no_grad():
        plain, stored = (
            load_dense(backbone, settings(folder, quantization=how))(**inputs).logits for how in ("none", "int8")
        )
    difference = (plain - stored).abs().max() / plain.abs().max()
    assert 0 < difference < 0.05


def test_the_plan_counts_a_byte_for_each_weight(folder: Path):
    backbone = open_backbone(settings(folder))
    plain, stored = (
        find_parts(build_empty(backbone, settings(folder, dtype="bfloat16", quantization=how)), backbone.architecture)
        for how in ("none", "int8")
    )
    for one, other in zip(plain, stored, strict=True):
        if not one.is_block:
            assert other == one
            continue
        integers = sum(numel for numel, size in zip(other.numels, other.itemsizes, strict=True) if size == 1)
        scales = other.numel - one.numel
        assert integers > 0.9 * one.numel
        assert scales > 0
        assert one.nbytes - other.nbytes == integers - 2 * scales
        assert one.shard_bytes(3) >= one.nbytes / 3
