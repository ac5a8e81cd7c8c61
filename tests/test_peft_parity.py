"""What PEFT makes of an exported bundle is what we trained: the same logits."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from hyperscale.assets.backbones import resolve_packaged
from hyperscale.config.backbone import BackboneSettings
from hyperscale.config.run import Recipe
from hyperscale.data.corpus import Corpus
from hyperscale.engine.base import Engine
from hyperscale.export.bundle import read_manifest
from hyperscale.export.exporter import TrainedGenerator, export_bundles
from hyperscale.export.peft_format import read_peft
from hyperscale.model.adapted import AdaptedModel
from hyperscale.model.backbone import load_dense, open_backbone
from hyperscale.model.generation import EagerGeneration
from hyperscale.model.quantized.four_bits import FourBitLinear
from hyperscale.model.weights import cast
from tests import tiny
from tests.runs import TASKS, corpus_of, engine_of, loader_of, make_recipe, write_tasks

# PEFT 0.21 asks transformers 5.23 by an old name.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    # PEFT 0.21 passes the cache by the name that transformers 5.24 replaced.
    pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning"),
]


def lora(*targets: str) -> dict[str, Any]:
    """A scale of 2.5, to be folded into B."""
    return {"kind": "lora", "rank": 4, "alpha": 10, "targets": targets}


def ia3(*targets: str) -> dict[str, Any]:
    return {"kind": "ia3", "targets": targets}


ADAPTERS = {
    "llama-default": ("llama", lora("q", "v")),
    "llama-all": ("llama", lora("all")),
    "t5-self-attention": ("t5", lora("q", "v")),
    "t5-cross-attention": ("t5", lora("cross_q", "cross_v")),
    "t5-all": ("t5", lora("all")),
    "t5-most": ("t5", lora("q", "v", "cross_q", "cross_v", "wi_0", "wi_1", "wo")),
    "llama-ia3": ("llama", ia3("k", "v", "feed_forward")),
    "llama-ia3-outputs": ("llama", ia3("q", "o", "up")),
    "t5-ia3": ("t5", ia3("k", "v", "cross_k", "cross_v", "feed_forward")),
    "t5-ia3-cross-attention": ("t5", ia3("cross_k", "feed_forward")),
    "llama-vera": ("llama", {"kind": "vera", "rank": 16, "projection_seed": 3}),
    "t5-vera": ("t5", {"kind": "vera", "rank": 8, "targets": ["q", "cross_v", "wo"]}),
    "llama-prefix": ("llama", {"kind": "prefix", "length": 5}),
    **{f"{family}-all": (family, lora("all")) for family in tiny.FAMILIES},
    **{f"{family}-prefix": (family, {"kind": "prefix", "length": 5}) for family in ("granite", "olmo2")},
    "phi3-ia3": ("phi3", ia3("qkv", "feed_forward")),
}


def trained(
    path: Path, adapter: dict[str, Any], tmp_path: Path, quantization: str = "none", **export: str
) -> tuple[Recipe, Engine, Corpus]:
    """Train three steps of one kind alone."""
    recipe = make_recipe(
        path,
        write_tasks(tmp_path / "tasks"),
        tmp_path / "run",
        backbone={"name": str(path), "dtype": "float32", "quantization": quantization},
        adaptation={"adapters": [adapter]},
        training={"steps": 3, "batch_size": 8, "optimizer": {"learning_rate": 0.02, "warmup_steps": 0}},
        export=export,
    )
    engine, corpus = engine_of(recipe), corpus_of(recipe)
    loader = loader_of(recipe, corpus, 0, 1)
    for step in range(recipe.training.steps):
        engine.train_step(loader.next_step(), step)
    return recipe, engine, corpus


def exported(recipe: Recipe, model: AdaptedModel, corpus: Corpus, output: Path) -> dict[str, Path]:
    backbone = {
        "name": recipe.backbone.name,
        "path": recipe.backbone.name,
        "is_local": True,
        "digest": open_backbone(recipe.backbone).digest(),
        "model_type": model.architecture.model_type,
    }
    tasks = tuple(loaded.task for loaded in corpus.tasks)
    origins = (None,) * len(tasks)
    trained_here = TrainedGenerator(recipe, model.site_map, model.generator, tasks, backbone, 3, origins)
    return export_bundles(trained_here, output)


def load_peft(recipe: Recipe, bundle: Path) -> Any:
    """Load a bundle as its users do; PEFT must know all its keys and miss none. A quantized base is dequantized."""
    base = load_dense(open_backbone(recipe.backbone), recipe.backbone.model_copy(update={"quantization": "none"}))
    stored = load_dense(open_backbone(recipe.backbone), recipe.backbone)
    for name, module in stored.named_modules():
        if isinstance(module, FourBitLinear):
            base.get_submodule(name).weight.data = module.dequantized(torch.float32)
    model = PeftModel.from_pretrained(base, bundle).eval()
    assert get_peft_model_state_dict(model).keys() == load_file(bundle / "adapter_model.safetensors").keys()
    return model


def questions(model: AdaptedModel) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 200, (3, 11), generator=random)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if model.architecture.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.randint(3, 200, (3, 5), generator=random)
    return inputs


@torch.no_grad()
def ours(model: AdaptedModel, task: int, inputs: dict[str, Tensor], stored: torch.dtype = torch.float32) -> Tensor:
    """Return our logits of one task, its weights rounded to `stored`."""
    weights = cast(cast(model.generator(torch.tensor([task])), stored), torch.float32)
    slots = torch.zeros(len(inputs["input_ids"]), dtype=torch.int64)
    with model.training(EagerGeneration(weights), slots, 1):
        logits: Tensor = model.backbone(**inputs).logits
    return logits


def folder_of(family: str, request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if family in tiny.FAMILIES:
        return tiny.tiny_family(tmp_path / family, family)
    return request.getfixturevalue(f"tiny_{family}_folder")


@pytest.mark.parametrize(("family", "adapter"), ADAPTERS.values(), ids=ADAPTERS.keys())
def test_same_logits(family: str, adapter: dict[str, Any], request: pytest.FixtureRequest, tmp_path: Path):
    recipe, engine, corpus = trained(folder_of(family, request, tmp_path), adapter, tmp_path)
    bundles = exported(recipe, engine.model, corpus, tmp_path / "bundles")
    assert list(bundles) == list(TASKS)
    inputs = questions(engine.model)
    untouched = engine.model.backbone(**inputs).logits
    tolerance = 1e-5 if adapter["kind"] == "ia3" else 1e-6  # it rounds 1 + δ, then multiplies
    logits = []
    for task, bundle in enumerate(bundles.values()):
        expected = ours(engine.model, task, inputs)
        with torch.no_grad():
            got = load_peft(recipe, bundle)(**inputs).logits
        assert (got - expected).abs().max() <= tolerance
        if adapter["kind"] != "prefix":  # `all` is recorded as what it stood for
            named = engine.model.site_map.targets_of(adapter["kind"])
            assert set(read_manifest(bundle).adapters[0].targets) == set(named) - {"all"}
        assert (expected - untouched).abs().max() > 1e-2
        logits.append(expected)
        again = read_peft(bundle, engine.model.site_map, recipe.adaptation.adapters)
        for group, named in engine.model.generator(torch.tensor([task])).items():
            for name, tensor in named.items():
                assert (again[group][name] - tensor).abs().max() <= 1e-6
    assert (logits[0] - logits[1]).abs().max() > 1e-3


def test_a_scale_by_the_root_of_the_rank_is_pefts_own(tiny_llama_folder: Path, tmp_path: Path):
    """The bundle has the scale in B. PEFT computes the same with `use_rslora`, the recipe's alpha and B as learned."""
    rank, alpha = 4, 4  # a scale of 2, which rounds nothing
    adapter = {"kind": "lora", "rank": rank, "alpha": alpha, "rslora": True, "targets": "all"}
    recipe, engine, corpus = trained(tiny_llama_folder, adapter, tmp_path)
    bundle = exported(recipe, engine.model, corpus, tmp_path / "bundles")["past"]
    inputs = questions(engine.model)
    expected = ours(engine.model, TASKS.index("past"), inputs)
    with torch.no_grad():
        folded = load_peft(recipe, bundle)(**inputs).logits
        config, tensors = bundle / "adapter_config.json", load_file(bundle / "adapter_model.safetensors")
        config.write_text(json.dumps(json.loads(config.read_text()) | {"use_rslora": True, "lora_alpha": alpha}))
        learned = {name: t / (alpha / rank**0.5) if "lora_B" in name else t for name, t in tensors.items()}
        save_file(learned, bundle / "adapter_model.safetensors", metadata={"format": "pt"})
        unfolded = load_peft(recipe, bundle)(**inputs).logits
        untouched = engine.model.backbone(**inputs).logits
    assert (folded - expected).abs().max() <= 1e-6
    assert (unfolded - expected).abs().max() <= 1e-6
    assert (expected - untouched).abs().max() > 1e-2


def test_a_bundle_in_bf16(tiny_llama_folder: Path, tmp_path: Path):
    recipe, engine, corpus = trained(tiny_llama_folder, lora("q", "v"), tmp_path, dtype="bfloat16")
    task, inputs = TASKS.index("past"), questions(engine.model)
    bundle = exported(recipe, engine.model, corpus, tmp_path / "bundles")["past"]
    assert {tensor.dtype for tensor in load_file(bundle / "adapter_model.safetensors").values()} == {torch.bfloat16}
    with torch.no_grad():
        got = load_peft(recipe, bundle)(**inputs).logits
    assert (got - ours(engine.model, task, inputs, stored=torch.bfloat16)).abs().max() <= 1e-6
    assert (got - ours(engine.model, task, inputs)).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_bundle_of_a_run_in_four_bits(family: str, request: pytest.FixtureRequest, tmp_path: Path):
    """It names the published weights as its base, and means the same on the dequantized ones as in the run."""
    path = request.getfixturevalue(f"tiny_{family}_folder")
    recipe, engine, corpus = trained(path, lora("all"), tmp_path, quantization="nf4")
    bundle = exported(recipe, engine.model, corpus, tmp_path / "bundles")["past"]
    assert json.loads((bundle / "adapter_config.json").read_text())["base_model_name_or_path"] == str(path)
    assert read_manifest(bundle).backbone.quantization == "nf4"
    inputs = questions(engine.model)
    expected = ours(engine.model, TASKS.index("past"), inputs)
    with torch.no_grad():
        actual = load_peft(recipe, bundle)(**inputs).logits
        published = load_dense(open_backbone(recipe.backbone), BackboneSettings(name=str(path), dtype="float32"))
        on_published = PeftModel.from_pretrained(published, bundle).eval()(**inputs).logits
    assert (actual - expected).abs().max() <= 1e-6
    assert 1e-3 < (on_published - expected).abs().max() < 0.3 * expected.abs().max()


def test_the_packaged_backbone(tmp_path: Path):
    path = resolve_packaged("smollm2-135m-instruct")
    recipe = make_recipe(
        path, write_tasks(tmp_path / "tasks"), tmp_path, adaptation={"adapters": [{"kind": "lora", "alpha": 16}]}
    )
    engine, corpus = engine_of(recipe), corpus_of(recipe)
    tiny.disturb(engine.model.generator)
    bundle = exported(recipe, engine.model, corpus, tmp_path / "bundles")["plural"]
    inputs = questions(engine.model)
    expected = ours(engine.model, TASKS.index("plural"), inputs)
    with torch.no_grad():
        untouched = engine.model.backbone(**inputs).logits
        got = load_peft(recipe, bundle)(**inputs).logits
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (expected - untouched).abs().max() > 0.1
