"""Every family of the table: what sets it apart from LLaMA is computed, adapted and decoded, or refused by name."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hyperscale.config.adaptation import AdaptationSettings
from hyperscale.model.adapted import AdaptedModel
from hyperscale.model.architectures import architecture_of
from hyperscale.model.sites import is_norm
from tests import plain, tiny

LONG = pytest.mark.long
NUM_TASKS = 3
PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
FUSED = ("qkv", "o", "gate_up", "down")
CROSS = ("q", "k", "v", "o", "cross_q", "cross_k", "cross_v", "cross_o", "wi_0", "wi_1", "wo")


def adapters(model_type: str) -> dict[str, dict[str, Any]]:
    is_t5, is_fused = model_type.endswith("t5"), model_type == "phi3"
    scaled = ("qkv",) if is_fused else ("k", "v", "cross_k", "cross_v") if is_t5 else ("k", "v")
    targets = FUSED if is_fused else CROSS if is_t5 else PROJECTIONS
    return {
        "lora": {"kind": "lora", "rank": 2, "alpha": 5.0, "targets": targets},
        "bottleneck": {"kind": "bottleneck", "reduction": 8},
        "conditional norm": {"kind": "bottleneck", "reduction": 8, "layer_norm": True},
        "ia3": {"kind": "ia3", "targets": (*scaled, "feed_forward")},
        "norm_delta": {"kind": "norm_delta"},
        "prefix": {"kind": "prefix", "length": 3},
    }


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_family(tmp_path_factory.mktemp("families") / family, family)


def settings(family: str, *kinds: str, generator: str = "hypernetwork") -> AdaptationSettings:
    chosen = {"generator": {"kind": generator}, "adapters": [adapters(family)[kind] for kind in kinds]}
    return AdaptationSettings.model_validate(chosen)


def model(folder: Path, family: str, *kinds: str, generator: str = "hypernetwork", **backbone: Any) -> AdaptedModel:
    chosen = settings(family, *kinds, generator=generator)
    return tiny.adapted_model(folder, chosen.model_dump(), NUM_TASKS, **backbone)


def questions(adapted: AdaptedModel, rows: int = 4, length: int = 9) -> dict[str, Tensor]:
    """Rows of unlike lengths, padded on the right; most are longer than a window."""
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 230, (rows, length), generator=random)
    mask = (torch.arange(length) < torch.arange(length - rows + 1, length + 1).unsqueeze(1)).long()
    made = {"input_ids": ids, "attention_mask": mask}
    if adapted.architecture.is_encoder_decoder:
        made["decoder_input_ids"] = torch.randint(3, 230, (rows, 4), generator=random)
    return made


def logits(adapted: AdaptedModel, batch: dict[str, Tensor]) -> Tensor:
    return adapted.backbone(**batch, use_cache=False).logits


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_step_0_is_exactly_the_untouched_backbone(family: str, folder: Path, dtype: str):
    adapted = model(folder, family, "lora", "conditional norm", "ia3", "norm_delta", dtype=dtype)
    batch, tasks = questions(adapted), torch.tensor([0, 2, 2, 0])
    untouched = logits(adapted, batch)
    with adapted.adapting(tasks):
        assert torch.equal(logits(adapted, batch), untouched)
    tiny.disturb(adapted.generator)
    with adapted.adapting(tasks):
        assert not torch.equal(logits(adapted, batch), untouched)
    assert torch.equal(logits(adapted, batch), untouched)


KINDS = ("lora", "bottleneck", "conditional norm", "ia3", "norm_delta", "prefix")


@pytest.mark.parametrize(
    "kinds",
    [("lora", "conditional norm", "ia3", "norm_delta", "prefix"), *(pytest.param((kind,), marks=LONG) for kind in KINDS)],
    ids="+".join,
)
def test_adapters_are_the_plain_formulas(family: str, folder: Path, kinds: tuple[str, ...]):
    """In float64, against transformers' own blocks with plain modules in them; forward and gradient."""
    backbone = {"attention": "sdpa"} if architecture_of(family).is_encoder_decoder else {}
    ours, theirs = (model(folder, family, *kinds, **backbone) for _ in range(2))
    for adapted in (ours, theirs):
        adapted.generator.double()
        tiny.disturb(adapted.generator, std=0.2)
        adapted.backbone.double()
        adapted.dtype = torch.float64
        plain.exact_norms(adapted.backbone)
    if not backbone:
        theirs.backbone.config._attn_implementation = plain.REFERENCE
    plain.compare(ours, theirs, settings(family, *kinds), questions(ours), torch.tensor([2, 0, 1, 0]))


def test_the_table_names_every_layer(family: str, folder: Path):
    """A linear layer or a norm of transformers' own module tree that no row names or leaves out is an error."""
    row, backbone = architecture_of(family), model(folder, family, "lora").backbone
    assert type(backbone).__name__ == row.model_class
    outside = layers_of(backbone)
    head = next(name for name, module in backbone.named_modules() if module is backbone.get_output_embeddings())
    for stack in row.stacks:
        named = {*stack.projections.values(), *stack.norms.values(), *stack.untouched}
        for number, block in enumerate(backbone.get_submodule(stack.blocks).children()):
            assert type(block).__name__ == row.block_class
            layers = layers_of(block)
            assert layers - named == set()
            assert set(stack.norms.values()) <= layers
            outside -= {f"{stack.blocks}.{number}.{name}" for name in layers}
    assert outside == {head, *(stack.final_norm for stack in row.stacks)}
    rotary = [name for name, module in backbone.named_modules() if "Rotary" in type(module).__name__]
    assert rotary == ([row.rotary] if row.rotary else [])


def layers_of(module: nn.Module) -> set[str]:
    return {name for name, layer in module.named_modules() if isinstance(layer, nn.Linear) or is_norm(layer)}
