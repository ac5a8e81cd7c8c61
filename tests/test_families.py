"""Every family of the table: what sets it apart from LLaMA is computed, adapted and decoded, or refused by name."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM, StableLmConfig, StableLmForCausalLM

from hyperscale.config.adaptation import AdaptationSettings, LoraSettings, NormDeltaSettings
from hyperscale.config.backbone import BackboneSettings
from hyperscale.errors import BackboneError, ConfigError
from hyperscale.export.module_tensors import tensors_by_module
from hyperscale.inference.decoding import greedy_decode
from hyperscale.model.adapted import AdaptedModel, label_positions
from hyperscale.model.adapters.registry import build_kinds
from hyperscale.model.architectures import architecture_of
from hyperscale.model.backbone import build_empty, load_dense, open_backbone
from hyperscale.model.sites import find_sites, is_norm
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
    arguments = {"input_ids": ids, "attention_mask": mask}
    if adapted.architecture.is_encoder_decoder:
        arguments["decoder_input_ids"] = torch.randint(3, 230, (rows, 4), generator=random)
    return arguments


def logits(adapted: AdaptedModel, batch: dict[str, Tensor]) -> Tensor:
    return adapted.backbone(**batch, use_cache=False).logits


@pytest.mark.parametrize(
    ("dtype", "quantization"), [("float32", "none"), ("bfloat16", "none"), ("bfloat16", "int8"), ("bfloat16", "nf4")]
)
def test_step_0_is_exactly_the_untouched_backbone(family: str, folder: Path, dtype: str, quantization: str):
    kinds = ("lora", "conditional norm", "ia3", "norm_delta")
    adapted = model(folder, family, *kinds, dtype=dtype, quantization=quantization)
    batch, tasks = questions(adapted), torch.tensor([0, 2, 2, 0])
    untouched = logits(adapted, batch)
    with adapted.adapting(tasks):
        assert torch.equal(logits(adapted, batch), untouched)
    tiny.disturb(adapted.generator)
    with adapted.adapting(tasks):
        assert not torch.equal(logits(adapted, batch), untouched)
    assert torch.equal(logits(adapted, batch), untouched)


ALL = ("lora", "conditional norm", "ia3", "norm_delta", "prefix")
KINDS = ("lora", "bottleneck", "conditional norm", "ia3", "norm_delta", "prefix")


@pytest.mark.parametrize(
    "kinds",
    [ALL, *(pytest.param((kind,), marks=LONG) for kind in KINDS)],
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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_norm_computes_with_another_weight(family: str, folder: Path, dtype: str):
    """To the last bit what transformers' module computes with that weight of its own, for each sample its own."""
    adapted = model(folder, family, "norm_delta", generator="independent", dtype=dtype)
    assert len(adapted.site_map.sites) == sum(is_norm(module) for module in adapted.backbone.modules())
    tiny.disturb(adapted.generator, std=0.3)
    tasks = torch.tensor([2, 0, 1, 0])
    deltas = [tensors_by_module(adapted.generator(task.view(1)), adapted.site_map) for task in tasks]
    activations: dict[str, tuple[Tensor, Tensor]] = {}
    for site in adapted.site_map.sites:
        norm = adapted.backbone.get_submodule(site.name)
        norm.register_forward_hook(
            lambda _norm, args, output, name=site.name: activations.update({name: (args[0], output)})
        )
    with adapted.adapting(tasks):
        logits(adapted, questions(adapted))
    assert activations.keys() == {site.name for site in adapted.site_map.sites}
    for name, (x, output) in activations.items():
        norm = adapted.backbone.get_submodule(name)
        weight = norm.weight.detach().clone()
        for row, delta in enumerate(deltas):
            norm.weight.copy_(weight + delta[name]["norm_delta"].to(adapted.dtype))
            assert torch.equal(norm(x)[row], output[row]), name
            norm.weight.copy_(weight)


@pytest.mark.parametrize("attention", ["auto", pytest.param("sdpa", marks=LONG), pytest.param("eager", marks=LONG)])
def test_decoding_with_a_cache_is_recomputing(family: str, folder: Path, attention: str):
    """Beyond the window, for padded rows of a mixed batch, of which some stop early; the window has an effect."""
    if family == "gemma2" and attention == "sdpa":
        pytest.skip("transformers has no fused attention with a soft cap")
    adapted = model(folder, family, *ALL, generator="independent", attention=attention)
    tiny.disturb(adapted.generator, std=0.3)
    batch, tasks = questions(adapted), torch.tensor([2, 0, 1, 0])
    ids, mask = batch["input_ids"], batch["attention_mask"]
    if not adapted.architecture.is_encoder_decoder:
        ids, mask = ids.flip(1), mask.flip(1)  # decoder-only prompts are padded on the left
    never, limits = torch.tensor([-1]), torch.tensor([8, 3, 2, 8])
    with torch.no_grad():
        with adapted.adapting(tasks):
            cached = greedy_decode(adapted, ids, mask, limits, never, bool)
        untouched = greedy_decode(adapted, ids, mask, limits, never, bool)
        for row, task in enumerate(tasks):
            prompt = ids[row : row + 1, mask[row].bool()]
            with adapted.adapting(task.view(1)):
                expected = tiny.recomputed(adapted, prompt, int(limits[row]))
            assert torch.equal(cached[row, : len(expected)], expected)
    assert not torch.equal(cached, untouched)


def test_label_logits_are_rows_of_the_whole(family: str, folder: Path):
    """Soft caps and factors after the head reach logits at label positions alone too."""
    adapted = model(folder, family, "lora")
    batch = questions(adapted)
    labels = torch.full((4, 9), -100)
    labels[:, 4:6] = torch.randint(3, 230, (4, 2))
    positions, targets, _ = label_positions(labels, adapted.architecture.is_encoder_decoder)
    with torch.no_grad():
        rows = adapted.label_logits(batch["input_ids"], batch["attention_mask"], labels, positions)
        whole = adapted.backbone(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            **({"labels": labels} if adapted.architecture.is_encoder_decoder else {}),
            use_cache=False,
        ).logits
    assert len(rows) == len(targets) == 8
    torch.testing.assert_close(rows, whole.flatten(0, 1)[positions], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False])
def test_an_empty_backbone_is_the_loaded_one(family: str, tmp_path: Path, dtype: str, tied: bool):
    path = tiny.tiny_family(tmp_path / family, family, tie_word_embeddings=tied)
    chosen = BackboneSettings.model_validate({"name": str(path), "dtype": dtype})
    opened = open_backbone(chosen)
    loaded, empty = load_dense(opened, chosen), build_empty(opened, chosen)
    for backbone in (loaded, empty):
        assert (backbone.get_output_embeddings().weight is backbone.get_input_embeddings().weight) is tied
    stored = dict(loaded.named_parameters(remove_duplicate=False))
    for name, parameter in empty.named_parameters(remove_duplicate=False):
        assert (parameter.is_meta, parameter.shape, parameter.dtype) == (True, stored[name].shape, stored[name].dtype)
    for (name, buffer), (other, reference) in zip(empty.named_buffers(), loaded.named_buffers(), strict=True):
        assert name == other
        assert torch.equal(buffer, reference)
    for name, parameter in stored.items():
        owner, _, key = name.rpartition(".")
        empty.get_submodule(owner).register_parameter(key, parameter)
    ids = torch.arange(3, 21).view(2, 9)
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if opened.architecture.is_encoder_decoder else {})
    assert torch.equal(empty(**inputs).logits, loaded(**inputs).logits)


def test_every_norm_or_none():
    """A row that leaves a norm out is refused by `norm_delta`, and by nothing else."""
    row = dataclasses.replace(architecture_of("llama"), model_type="qwen3")
    with torch.device("meta"):
        backbone = Qwen3ForCausalLM(Qwen3Config(vocab_size=50, hidden_size=32, num_hidden_layers=1, head_dim=8))
    with pytest.raises(
        ConfigError, match=r"norm_delta adapts every norm, .* 'qwen3' does not name 'self_attn\.q_norm'"
    ):
        find_sites(backbone, row, build_kinds([NormDeltaSettings()]))
    assert find_sites(backbone, row, build_kinds([LoraSettings()])).sites


def test_a_norm_of_torchs_own_is_an_error():
    row = dataclasses.replace(architecture_of("llama"), model_type="stablelm", model_class="StableLmForCausalLM")
    with torch.device("meta"):
        backbone = StableLmForCausalLM(StableLmConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1))
    with pytest.raises(ConfigError, match=r"'input_layernorm' is torch's own LayerNorm, which takes one"):
        find_sites(backbone, row, build_kinds([NormDeltaSettings()]))


def test_targets_of_fused_projections(tmp_path: Path):
    folder = tiny.tiny_family(tmp_path / "phi3", "phi3")
    with pytest.raises(
        ConfigError, match=r"target 'q' cannot be used on a phi3 backbone \(known: qkv, o, gate_up, down"
    ):
        tiny.adapted_model(folder, {"adapters": [{"kind": "lora", "targets": ["q", "v"]}]})
    sizes = {site.position: site.out_features for site in model(folder, "phi3", "prefix").site_map.sites}
    assert sizes == {"keys": 16, "values": 16}  # two heads of 8


def test_the_fused_kernel_without_a_soft_cap_is_an_error(tmp_path: Path):
    with pytest.raises(BackboneError, match=r"backbone\.attention: the fused kernel 'sdpa' cannot .* gemma2"):
        model(tiny.tiny_family(tmp_path / "gemma2", "gemma2"), "gemma2", "lora", attention="sdpa")


ONE_BASE = {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("sliding_attention", "full_attention")}
NEUTRAL: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "qwen2": {"layer_types": ["full_attention"] * 2},
    "qwen3": {"layer_types": ["full_attention"] * 2},
    "granite": {"embedding_multiplier": 1, "attention_multiplier": 1, "residual_multiplier": 1, "logits_scaling": 1},
    "smollm3": {"layer_types": ["full_attention"] * 2, "no_rope_layers": [1, 1]},
    "gemma2": {
        "layer_types": ["full_attention"] * 2,
        "query_pre_attn_scalar": 12,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    },
    "gemma3_text": {
        "layer_types": ["full_attention"] * 2,
        "query_pre_attn_scalar": 12,
        "final_logit_softcapping": None,
        "rope_parameters": ONE_BASE,
    },
    "olmo3": {
        "layer_types": ["full_attention"] * 2,
        "rope_parameters": ONE_BASE,
    },
    "phi3": {"sliding_window": None},
}
"""Fields of a tiny model's configuration with values at which they have no effect."""


@pytest.mark.parametrize(("family", "field"), [(name, field) for name, fields in NEUTRAL.items() for field in fields])
def test_the_tiny_models_tell(family: str, field: str, tmp_path: Path):
    """Each window, cap, factor and rotation of a tiny model moves its logits: tests on it would notice its loss."""
    folder = tiny.tiny_family(tmp_path / family, family)
    adapted = model(folder, family, "lora")
    path = folder / "config.json"
    changed = json.loads(path.read_text())
    path.write_text(json.dumps(changed | {field: NEUTRAL[family][field]}))
    batch = questions(adapted)
    real = batch["attention_mask"].bool()
    assert (logits(adapted, batch) - logits(model(folder, family, "lora"), batch))[real].abs().max() > 1e-3
