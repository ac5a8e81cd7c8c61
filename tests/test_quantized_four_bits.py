"""Weights in four bits: bitsandbytes' numbers, the same bits on any number of ranks, and products of them."""

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hyperscale.engine.shard_sources import AbsmaxSource, CodeSource, FourBitTensor, ScaleSource
from hyperscale.engine.slices import index_tensors, slice_reader
from hyperscale.model.quantized import codes
from hyperscale.model.quantized.codes import FourBitKind, FourBits, dequantize, quantize
from hyperscale.model.quantized.four_bits import (
    FourBitEmbedding,
    FourBitLinear,
    dequantize_with_bitsandbytes,
    four_bits_of,
)
from tests import tiny
from tests.bitsandbytes_numbers import DTYPES, FILE, SHAPES, digest, numbers_of, numbers_of_bitsandbytes, weight_of

KINDS: tuple[FourBitKind, ...] = get_args(FourBitKind)
CASES = [(shape, seed, dtype) for seed, shape in enumerate(SHAPES) for dtype in DTYPES]


@pytest.fixture(params=CASES, ids=[f"{rows}x{columns}-{dtype}" for (rows, columns), _, dtype in CASES])
def case(request: pytest.FixtureRequest) -> tuple[str, Tensor]:
    (rows, columns), seed, dtype = request.param
    return f"{rows}x{columns} {dtype}", weight_of((rows, columns), seed).to(DTYPES[dtype])


def test_numbers_are_those_that_bitsandbytes_made(case: tuple[str, Tensor]):
    """With its offset: the mean of many numbers depends on the processor's vector width in the last bit."""
    name, weight = case
    expected = json.loads(FILE.read_text())["cases"][name]
    packed, absmax = codes.encode(weight.flatten(), "nf4")
    assert codes.mean_absmax(absmax).item() == pytest.approx(expected["offset"], rel=1e-6)
    offset = torch.tensor(expected["offset"])
    indices, scales = codes.compress(absmax, offset)
    stored = FourBits(packed.unsqueeze(1), indices, codes.scale_bits(scales, offset))
    values = dequantize(stored, "nf4", weight.numel(), weight.dtype)
    assert numbers_of(packed.view(torch.uint8), indices.view(torch.uint8), scales, offset, values) == expected


def test_numbers_are_those_of_the_installed_bitsandbytes(case: tuple[str, Tensor]):
    pytest.importorskip("bitsandbytes")
    _, weight = case
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # its own offset depends on the number of threads in the last bit
    try:
        expected = numbers_of_bitsandbytes(weight)
    finally:
        torch.set_num_threads(threads)
    stored = quantize(weight, "nf4")
    values = dequantize(stored, "nf4", weight.numel(), weight.dtype)
    scale = stored.scale.view(torch.float32)
    numbers = (stored.codes.view(torch.uint8), stored.absmax.view(torch.uint8), scale[:-1], scale[-1], values)
    assert numbers_of(*numbers) == expected
    assert torch.equal(dequantize_with_bitsandbytes(stored, weight.numel(), weight.dtype), values)


def test_a_table_of_sixteen_numbers_is_ascending():
    for kind in KINDS:
        table = codes.table_of(kind)
        assert len(table) == 16
        assert (table.diff() > 0).all()
        assert 0.0 in table.tolist()
    assert len(codes.absmax_table()) == 256
    assert (codes.absmax_table().diff() > 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_no_weight_moves_further_than_to_the_nearest_number(kind: FourBitKind):
    weight = torch.randn(40, 128, generator=torch.Generator().manual_seed(0)).mul_(0.05)
    stored = quantize(weight, kind)
    assert quantize(torch.zeros(3, 70), kind).absmax.shape == (4,)
    values = dequantize(stored, kind, weight.numel(), torch.float64).view(weight.shape)
    absmax = weight.view(-1, 64).abs().amax(1)
    stored_absmax = codes.absmax_of(stored)
    assert ((stored_absmax - absmax).abs() / absmax).max() < 0.03, "the second quantization is fine"
    table = codes.table_of(kind)
    gap = table[table >= -1].diff().max() / 2
    error = (values - weight.double()).abs().view(-1, 64)
    assert (error <= (absmax * gap + (stored_absmax - absmax).abs()).unsqueeze(1) * (1 + 1e-5)).all()
    assert error.mean() < {"nf4": 0.005, "int4": 0.006}[kind]


def layer_of(linear: nn.Linear, kind: FourBitKind) -> FourBitLinear:
    return FourBitLinear(linear, four_bits_of(linear.weight, kind), kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("width", "bias"), [(64, False), (24, True), (33, True)])
def test_output_and_gradient_are_those_of_the_stored_weight(kind: FourBitKind, width: int, bias: bool):
    linear = nn.Linear(width, 11, bias=bias).requires_grad_(False)
    stored = layer_of(linear, kind)
    assert not any(
        one.requires_grad or one.is_floating_point() for one in stored.parameters() if one is not stored.bias
    )
    whole = dequantize(quantize(linear.weight, kind), kind, linear.weight.numel(), torch.float64).view(11, width)
    assert 0 < (whole - linear.weight).abs().max() < 0.1
    tiny.check_products(stored, whole, linear.bias)


def test_nothing_of_the_weight_waits_for_the_backward_pass():
    stored = layer_of(nn.Linear(64, 64, bias=False).requires_grad_(False), "nf4")
    saved: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        stored(torch.randn(2, 64, requires_grad=True)).sum()
    assert not any(tensor.numel() >= 64 for tensor in saved)


def test_chunks_do_not_change_a_number(monkeypatch: pytest.MonkeyPatch):
    weight = weight_of((29, 67), 3)
    stored = quantize(weight, "nf4")
    whole = dequantize(stored, "nf4", weight.numel(), torch.bfloat16)
    monkeypatch.setattr(codes, "_CHUNK", 128)
    assert torch.equal(dequantize(stored, "nf4", weight.numel(), torch.bfloat16), whole)


def test_slabs_do_not_change_a_product(monkeypatch: pytest.MonkeyPatch):
    linear = nn.Linear(96, 1100).requires_grad_(False)
    layer = layer_of(linear, "nf4")
    x = torch.randn(2, 3, 96, generator=torch.Generator().manual_seed(1), requires_grad=True)
    weight = layer.dequantized(torch.float32)
    expected = torch.nn.functional.linear(x, weight, layer.bias)
    (of_input,) = torch.autograd.grad(expected.square().sum(), x)
    monkeypatch.setattr("hyperscale.model.quantized.four_bits._SLAB_BYTES", 1)
    slabs = list(layer.slabs(torch.float32))
    assert len(slabs) == 3
    assert torch.equal(torch.cat([slab for _, slab in slabs]), weight)
    y = layer(x)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer(x.detach()), y.detach(), rtol=0, atol=0)
    (actual,) = torch.autograd.grad(y.square().sum(), x)
    torch.testing.assert_close(actual, of_input, rtol=1e-4, atol=1e-4)


def test_an_embedding_looks_up_the_rows_of_the_stored_weight():
    embedding = nn.Embedding(300, 192, dtype=torch.bfloat16).requires_grad_(False)
    layer = FourBitEmbedding(embedding, four_bits_of(embedding.weight, "nf4"), "nf4")
    ids = torch.randint(0, 300, (4, 50), generator=torch.Generator().manual_seed(0))
    ids[0, :2] = torch.tensor([0, 299])
    assert torch.equal(layer(ids), layer.dequantized(torch.bfloat16)[ids])
    assert repr(layer).startswith("FourBitEmbedding(300, 192")  # DeepSpeed prints its model


@dataclass
class Threads:
    """Ranks that are threads of one process: enough for what loading needs of a group."""

    rank: int
    world_size: int
    values: list[Any]
    barrier_of_all: threading.Barrier

    def gather(self, value: Any) -> list[Any]:
        self.values[self.rank] = value
        self.barrier_of_all.wait(20)
        values = list(self.values)
        self.barrier_of_all.wait(20)
        return values

    def sum(self, tensor: Tensor) -> None:
        raise NotImplementedError

    def anyone(self, flag: bool) -> bool:
        raise NotImplementedError

    def from_first(self, value: Any) -> Any:
        raise NotImplementedError

    def barrier(self) -> None:
        raise NotImplementedError


def on_ranks(world_size: int, run: Callable[[Threads], list[Tensor]]) -> list[list[Tensor]]:
    barrier, values = threading.Barrier(world_size), [None] * world_size
    ranks = [Threads(rank, world_size, values, barrier) for rank in range(world_size)]
    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(run, ranks))


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_any_number_of_ranks_stores_the_same_bits(
    tmp_path: Path, world_size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    """Pieces of a few blocks are read at a time, as of a large tensor."""
    monkeypatch.setattr("hyperscale.engine.shard_sources._READ_BYTES", 4 * 64 * 5)
    file = tmp_path / "model.safetensors"
    weights = {"odd": weight_of((37, 61), 2), "wide": weight_of((300, 128), 7), "short": weight_of((5, 7), 5)}
    save_file(weights, file)
    stored = index_tensors([file])
    for name, weight in weights.items():
        expected = quantize(weight.to(dtype), "nf4")

        def fill(group: Threads, name: str = name, expected: FourBits = expected) -> list[Tensor]:
            tensor = FourBitTensor(stored[name], "nf4", group)
            shares = []
            with slice_reader() as reader:
                for whole, source in zip(
                    expected, (CodeSource(tensor), AbsmaxSource(tensor), ScaleSource(tensor)), strict=True
                ):
                    size = -(-whole.numel() // world_size)
                    share = torch.zeros(size, dtype=whole.dtype)
                    source.fill(share, group.rank * size, reader, dtype)
                    sample = torch.zeros(min(9, size), dtype=whole.dtype)
                    source.fill_sample(sample, group.rank * size, reader, dtype)
                    assert torch.equal(sample, share[: len(sample)])
                    shares.append(share)
            return shares

        actual = on_ranks(world_size, fill)
        for number, whole in enumerate(expected):
            together = torch.cat([shares[number] for shares in actual])
            assert torch.equal(together[: whole.numel()], whole.flatten()), (name, number)
            assert not together[whole.numel() :].any(), "padding"


def test_digests_depend_on_bits():
    assert digest(torch.zeros(3)) != digest(torch.zeros(3).neg())
