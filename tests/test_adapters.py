"""Adapter kinds against their papers' formulas, written plainly: float64, one sample and one token at a time."""

import math
from collections.abc import Mapping
from typing import get_args

import pytest
import torch
from torch import Tensor

from hyperscale.config.adaptation import (
    AdapterSettings,
    BottleneckSettings,
    Ia3Settings,
    LoraSettings,
    NormDeltaSettings,
    PrefixSettings,
    VeraSettings,
)
from hyperscale.model.adapters.bottleneck import Bottleneck
from hyperscale.model.adapters.ia3 import Ia3
from hyperscale.model.adapters.kinds import AdapterKind, TensorSpec
from hyperscale.model.adapters.lora import Lora
from hyperscale.model.adapters.norm_delta import NormDelta
from hyperscale.model.adapters.prefix import Prefix
from hyperscale.model.adapters.registry import ADAPTER_KINDS, build_kinds
from hyperscale.model.families.table import NORMS

B, T, IN, OUT = 3, 4, 6, 10

KINDS: list[AdapterKind] = [
    Lora(LoraSettings(rank=2, alpha=3.0)),
    *(
        Bottleneck(BottleneckSettings.model_validate({"reduction": 3, "activation": activation}))
        for activation in ("gelu", "gelu_new", "relu", "silu")
    ),
    Bottleneck(BottleneckSettings(reduction=3, layer_norm=True)),
    Ia3(Ia3Settings()),
]
IDS = ["lora", "gelu", "gelu_new", "relu", "silu", "conditional norm", "ia3"]
each_kind = pytest.mark.parametrize("kind", KINDS, ids=IDS)
LAST = {"lora": {"b"}, "bottleneck": {"up", "up_bias"}, "ia3": {"delta"}}
"""What starts at zero and learns at once."""


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(math.prod(shape)), dtype=torch.float64)


def weights_per_sample(kind: AdapterKind) -> dict[str, Tensor]:
    return {name: draw(B, *spec.shape) for name, spec in kind.tensors(IN, OUT).items()}


def plain(kind: AdapterKind, x: list[float], y: list[float], weights: Mapping[str, Tensor]) -> list[float]:
    """Adapt one token of one sample with Python's own arithmetic."""

    def times(matrix: list[list[float]], vector: list[float]) -> list[float]:
        return [math.fsum(a * b for a, b in zip(row, vector, strict=True)) for row in matrix]

    def plus(*vectors: list[float]) -> list[float]:
        return [math.fsum(parts) for parts in zip(*vectors, strict=True)]

    w = {name: tensor.tolist() for name, tensor in weights.items()}
    if isinstance(kind, Lora):
        return plus(y, times(w["b"], times(w["a"], x)))
    if isinstance(kind, Ia3):
        return [(1 + delta) * value for delta, value in zip(w["delta"], y, strict=True)]
    assert isinstance(kind, Bottleneck)
    act = {
        "relu": lambda v: max(v, 0.0),
        "silu": lambda v: v / (1 + math.exp(-v)),
        "gelu": lambda v: v / 2 * (1 + math.erf(v / math.sqrt(2))),
        "gelu_new": lambda v: v / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))),
    }[kind.settings.activation]
    hidden = [act(value) for value in plus(times(w["down"], y), w["down_bias"])]
    branch = plus(times(w["up"], hidden), w["up_bias"])
    if kind.settings.layer_norm:
        mean = math.fsum(branch) / len(branch)
        std = math.sqrt(math.fsum((value - mean) ** 2 for value in branch) / len(branch) + 1e-5)
        branch = [
            gamma * (value - mean) / std + beta
            for gamma, beta, value in zip(w["gamma"], w["beta"], branch, strict=True)
        ]
    return plus(y, branch)


@each_kind
def test_formula(kind: AdapterKind):
    x, y, weights = draw(B, T, IN), draw(B, T, OUT), weights_per_sample(kind)
    adapted = kind.apply(x, y, weights)
    expected = [
        [
            plain(kind, x[b, t].tolist(), y[b, t].tolist(), {name: tensor[b] for name, tensor in weights.items()})
            for t in range(T)
        ]
        for b in range(B)
    ]
    torch.testing.assert_close(adapted, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(adapted, y)
    for b in range(B):  # one task's weights for the whole batch are the same function
        alone = kind.apply(x[b : b + 1], y[b : b + 1], {name: tensor[b] for name, tensor in weights.items()})
        torch.testing.assert_close(alone, adapted[b : b + 1], rtol=1e-12, atol=1e-12)


@each_kind
def test_gradients(kind: AdapterKind):
    names = list(kind.tensors(IN, OUT))
    for weights in (weights_per_sample(kind), {name: w[0] for name, w in weights_per_sample(kind).items()}):

        def adapted(x: Tensor, y: Tensor, *tensors: Tensor) -> Tensor:
            return kind.apply(x, y, dict(zip(names, tensors, strict=True)))

        inputs = [draw(B, T, IN), draw(B, T, OUT), *weights.values()]
        assert torch.autograd.gradcheck(adapted, [tensor.requires_grad_() for tensor in inputs])


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_start(kind: AdapterKind, dtype: torch.dtype):
    """The output is exactly the backbone's, and what starts at zero already learns."""
    specs = kind.tensors(IN, OUT)
    assert {spec.start for spec in specs.values()} <= {"zero", "normal"}
    weights = {name: (draw(B, *spec.shape) * std(spec)).to(dtype).requires_grad_() for name, spec in specs.items()}
    x, y = draw(B, T, IN).to(dtype), draw(B, T, OUT).to(dtype)
    adapted = kind.apply(x, y, weights)
    assert adapted.dtype == dtype
    assert torch.equal(adapted, y)
    adapted.square().sum().backward()
    last = {"gamma", "beta"} if "gamma" in specs else LAST[kind.name]
    assert {name for name, tensor in weights.items() if tensor.grad is not None and tensor.grad.any()} == last


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norms_weight(dtype: torch.dtype):
    """The kind gets a norm's weight, and returns one for the batch or for each sample; at zero it is the same."""
    kind, weight, delta = NormDelta(NormDeltaSettings()), draw(OUT).to(dtype), draw(B, OUT).to(dtype)
    assert {name: (spec.shape, spec.start) for name, spec in kind.tensors(OUT, OUT).items()} == {
        "delta": ((OUT,), "zero")
    }
    each = kind.apply(weight, weight, {"delta": delta})
    assert torch.equal(each, weight + delta)
    for b in range(B):
        assert torch.equal(kind.apply(weight, weight, {"delta": delta[b]}), each[b])
    assert torch.equal(kind.apply(weight, weight, {"delta": torch.zeros_like(delta)}), weight.expand(B, -1))


def std(spec: TensorSpec) -> float:
    return 0.0 if spec.start == "zero" else spec.fan_in**-0.5


def test_a_prefix_stands_before_every_sample():
    kind = Prefix(PrefixSettings(length=2))
    assert {name: (spec.shape, spec.start) for name, spec in kind.tensors(IN, 6).items()} == {
        "rows": ((2, 6), "normal")
    }
    states = draw(B, 3, T, 2)  # 3 heads of width 2
    rows = draw(B, 2, 6)
    each = kind.apply(states, states, {"rows": rows})
    assert each.shape == (B, 3, 2 + T, 2)
    assert torch.equal(each[:, :, 2:], states)
    for b in range(B):
        for head in range(3):
            assert torch.equal(each[b, head, :2], rows[b, :, 2 * head : 2 * head + 2])
        one = kind.apply(states, states, {"rows": rows[b]})
        assert torch.equal(one[b], each[b])
        assert torch.equal(one[0, :, :2], each[b, :, :2])


def test_sizes_and_scales():
    lora = Lora(LoraSettings(rank=4, alpha=10.0)).tensors(IN, OUT)
    assert {name: spec.shape for name, spec in lora.items()} == {"a": (4, IN), "b": (OUT, 4)}
    assert (lora["a"].scale, lora["b"].scale) == (1.0, 2.5)  # alpha / rank, on B alone
    assert (lora["a"].start, lora["a"].fan_in, lora["b"].start) == ("normal", IN, "zero")
    stable = Lora(LoraSettings(rank=4, alpha=10.0, rslora=True)).tensors(IN, OUT)
    assert (stable["a"].scale, stable["b"].scale) == (1.0, 5.0)  # alpha / √rank
    bottleneck = Bottleneck(BottleneckSettings(reduction=4)).tensors(IN, 32)
    assert {name: spec.shape for name, spec in bottleneck.items()} == {
        "down": (8, 32),
        "down_bias": (8,),
        "up": (32, 8),
        "up_bias": (32,),
    }
    assert [spec.numel for spec in bottleneck.values()] == [256, 8, 256, 32]
    assert {spec.scale for spec in bottleneck.values()} == {1.0}
    assert Bottleneck(BottleneckSettings(reduction=64)).tensors(IN, 32)["down"].shape == (1, 32)  # never empty
    conditional = Bottleneck(BottleneckSettings(reduction=4, layer_norm=True)).tensors(IN, 32)
    assert {name: spec.shape for name, spec in conditional.items() if name not in bottleneck} == {
        "gamma": (32,),
        "beta": (32,),
    }
    assert {name for name, spec in conditional.items() if spec.start == "normal"} == {"down", "up"}
    assert Ia3(Ia3Settings()).tensors(IN, OUT)["delta"].shape == (OUT,)


def test_every_kind_of_the_recipe_is_built():
    (union, *_) = get_args(AdapterSettings)
    assert {member.model_fields["kind"].default for member in get_args(union)} == set(ADAPTER_KINDS)
    settings = [
        PrefixSettings(),
        NormDeltaSettings(),
        BottleneckSettings(targets=("attention",)),
        Ia3Settings(),
        VeraSettings(targets=("o", "q", "k")),
        LoraSettings(targets=("o", "k")),
    ]
    kinds = build_kinds(settings)
    # the order in which they act, not the recipe's
    assert [kind.name for kind in kinds] == ["lora", "vera", "ia3", "bottleneck", "norm_delta", "prefix"]
    assert {kind.name: [kind.acts_on(target) for target in kind.targets] for kind in kinds} == {
        "lora": ["projections"] * 2,
        "vera": ["projections"] * 3,
        "ia3": ["projections", "projections", "inputs"],
        "bottleneck": ["sublayers"],
        "norm_delta": ["norms"] * (len(NORMS) + 1),
        "prefix": ["keys", "values"],
    }
    assert [kind.name for kind in kinds if not kind.is_generated] == ["norm_delta"]
