"""A backbone whose blocks are stored as 8-bit integers: how far from the original, and the same everywhere."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hyperscale.config.backbone import BackboneSettings
from hyperscale.errors import BackboneError
from hyperscale.model.backbone import build_empty, load_dense, open_backbone
from hyperscale.model.quantized import four_bits
from hyperscale.model.quantized.blocks import num_weights
from hyperscale.model.quantized.four_bits import FourBitWeight
from hyperscale.model.quantized.int8 import Int8Linear, quantize
from hyperscale.planning.parts import find_parts
from tests import tiny


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
    tiny.check_products(stored, whole, linear.bias)


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


@pytest.mark.parametrize("how", ["nf4", "int4", "nf4_all"])
def test_four_bits_take_the_place_of_the_right_layers(folder: Path, how: str, tmp_path: Path):
    if how == "nf4_all":
        make = tiny.tiny_llama if "llama" in folder.name else tiny.tiny_t5
        folder = make(tmp_path / "wide", **{"hidden_size" if "llama" in folder.name else "d_model": 64})
    backbone = open_backbone(settings(folder))
    stored = load_dense(backbone, settings(folder, quantization=how))
    originals = dict(load_dense(backbone, settings(folder, quantization="none")).named_modules(remove_duplicate=False))
    stacks = tuple(f"{stack.blocks}." for stack in backbone.architecture.stacks)
    vocabulary = [stored.get_input_embeddings(), stored.get_output_embeddings()]
    for name, module in stored.named_modules(remove_duplicate=False):
        inside = name.startswith(stacks) and isinstance(originals[name], nn.Linear)
        is_vocabulary = how == "nf4_all" and (module in vocabulary or name.endswith("embed_tokens"))
        assert isinstance(module, FourBitWeight) == (inside or is_vocabulary), name
        if isinstance(module, FourBitWeight):
            expected = four_bits.quantize(originals[name].weight, module.kind)
            assert all(torch.equal(one, other) for one, other in zip(module.stored, expected, strict=True))
    if how == "nf4_all" and "llama" in str(make):
        assert vocabulary[0].weight is vocabulary[1].weight
    empty = build_empty(backbone, settings(folder, quantization=how))
    shapes = [(name, one.shape, one.dtype, one.requires_grad) for name, one in stored.named_parameters()]
    assert [(name, one.shape, one.dtype, one.requires_grad) for name, one in empty.named_parameters()] == shapes
    assert num_weights(empty) == num_weights(stored) == sum(one.numel() for one in originals[""].parameters())


def test_a_vocabulary_that_four_bits_cannot_hold_is_named(tmp_path: Path):
    path = tiny.tiny_llama(tmp_path / "narrow", hidden_size=48, num_attention_heads=4, num_key_value_heads=2)
    with pytest.raises(BackboneError, match=r"nf4_all takes .* multiple of 64; .* of width 48: use nf4"):
        load_dense(open_backbone(settings(path)), settings(path, quantization="nf4_all"))


def test_the_quantized_model_gives_almost_the_same_logits(folder: Path):
    backbone = open_backbone(settings(folder))
    ids = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if backbone.architecture.is_encoder_decoder else {})
    with torch.no_grad():
        plain, stored = (
            load_dense(backbone, settings(folder, quantization=one))(**inputs).logits for one in ("none", "int8")
        )
    difference = (plain - stored).abs().max() / plain.abs().max()
    assert 0 < difference < 0.05


@pytest.mark.parametrize("how", ["nf4", "int4"])
def test_a_model_in_four_bits_is_the_model_of_its_dequantized_weights(folder: Path, how: str):
    backbone = open_backbone(settings(folder))
    ids = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if backbone.architecture.is_encoder_decoder else {})
    stored, plain = (load_dense(backbone, settings(folder, quantization=one)) for one in (how, "none"))
    with torch.no_grad():
        published = plain(**inputs).logits
        for name, module in stored.named_modules():
            if isinstance(module, FourBitWeight):
                plain.get_submodule(name).weight.data = module.dequantized(torch.float32)
        expected, actual = plain(**inputs).logits, stored(**inputs).logits
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert (expected - published).abs().max() > 0.01


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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_plan_counts_the_true_bits(tmp_path: Path, dtype: str):
    """4 + 8/64 + 32/(64 · 256) bits a weight, and 32 more a tensor for its offset."""
    path = tiny.tiny_llama(tmp_path / "round", hidden_size=512, intermediate_size=2048, head_dim=64)
    backbone = open_backbone(settings(path))
    plain, stored = (
        find_parts(build_empty(backbone, settings(path, dtype=dtype, quantization=how)), backbone.architecture)
        for how in ("none", "nf4")
    )
    for one, other in zip(plain, stored, strict=True):
        assert other.weights == one.weights == one.numel
        if not one.is_block:
            assert other == one
            continue
        norms = 2 * 512
        bits = (one.numel - norms) * (4 + 8 / 64 + 32 / (64 * 256)) + 7 * 32 + norms * 8 * one.itemsizes[0]
        assert 8 * other.nbytes == bits
