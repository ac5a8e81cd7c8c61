"""Text models inside multimodal checkpoints: they alone are read, and bundles fit the whole."""

import json
import re
import shutil
from pathlib import Path
from typing import Any, Self

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig

import hyperscale as hs
from hyperscale.config.backbone import BackboneSettings
from hyperscale.config.run import Recipe
from hyperscale.engine import slices
from hyperscale.errors import BackboneError, BundleError
from hyperscale.export.exporter import TrainedGenerator, export_bundles
from hyperscale.launch.local import train_in_process
from hyperscale.model import checkpoint_files
from hyperscale.model.adapted import AdaptedModel
from hyperscale.model.backbone import BackboneFolder, load_dense, open_backbone, open_shapes
from hyperscale.planning.memory import describe_run
from hyperscale.run.plan import PlanOptions, plan_recipe
from hyperscale.serving.load import load_bundles
from tests import tiny
from tests.command import run
from tests.ranks import Ranks
from tests.runs import corpus_of, make_recipe
from tests.test_zero_matches_local import assert_same_training, gathered, recipes, train

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning"),
]

VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
WINDOW = 6
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 8,
    "max_position_embeddings": 512,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
# name -> class of the whole, fields of its configuration, of its text model's and of its vision tower's
WHOLES: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "gemma3": (
        "Gemma3",
        {"tie_word_embeddings": True, "mm_tokens_per_image": 4, "image_token_index": 1},
        {"model_type": "gemma3_text", "sliding_window": WINDOW, "sliding_window_pattern": 2, "head_dim": 12},
        {"model_type": "siglip_vision_model"},
    ),
    "mistral_small": (
        "Mistral3",
        {"tie_word_embeddings": False, "spatial_merge_size": 1},
        {"model_type": "mistral", "head_dim": 12, "sliding_window": None},
        {"model_type": "pixtral", "head_dim": 8},
    ),
    "ministral3": (
        "Mistral3",
        {"tie_word_embeddings": True, "spatial_merge_size": 1},
        {"model_type": "ministral3", "head_dim": 12, "rope_parameters": YARN},
        {"model_type": "pixtral", "head_dim": 8},
    ),
}
LORA = {"kind": "lora", "rank": 2, "alpha": 5.0, "targets": ["q", "v", "down"]}


def save_whole(folder: Path, name: str) -> Path:
    """Save a multimodal model with random weights, under the names that `save_pretrained` gives its tensors."""
    stem, fields, text, vision = WHOLES[name]
    sizes = tiny.llama_sizes(folder) | {"tie_word_embeddings": fields["tie_word_embeddings"]}
    config = getattr(transformers, f"{stem}Config")(text_config=sizes | text, vision_config=VISION | vision, **fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, f"{stem}ForConditionalGeneration")(config)
    model.generation_config = GenerationConfig.from_model_config(config.text_config)
    model.save_pretrained(folder)
    return folder


def rename(folder: Path, copy: Path, *changes: tuple[str, str]) -> Path:
    """Copy a checkpoint with other names for its tensors; `changes`: regular expression and replacement."""
    shutil.copytree(folder, copy)
    tensors = load_file(copy / "model.safetensors")
    for pattern, replacement in changes:
        tensors = {re.sub(pattern, replacement, name): tensor for name, tensor in tensors.items()}
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each model in the layout of transformers' `save_pretrained`, which most published checkpoints have, and in that
    of transformers' own classes.
    """
    root = tmp_path_factory.mktemp("multimodal")
    saved = {}
    for name in WHOLES:
        saved[name] = save_whole(root / name, name)
        saved[f"{name}-new"] = rename(
            saved[name],
            root / f"{name}-new",
            (r"^language_model\.model\.", "model.language_model."),
            (r"^language_model\.lm_head\.", "lm_head."),
            (r"^(vision_tower|multi_modal_projector)\.", r"model.\1."),
        )
    return saved


LAYOUTS = [f"{name}{layout}" for name in WHOLES for layout in ("", "-new")]


def opened(folder: Path) -> tuple[BackboneFolder, BackboneSettings]:
    settings = BackboneSettings(name=str(folder), dtype="float32")
    return open_backbone(settings), settings


def whole_model(folder: Path) -> Any:
    """Load the whole multimodal model with transformers."""
    stem = WHOLES[folder.name.removesuffix("-new")][0]
    model_class = getattr(transformers, f"{stem}ForConditionalGeneration")
    return model_class.from_pretrained(folder, attn_implementation="eager").eval()


def questions() -> dict[str, Tensor]:
    ids = torch.randint(3, 230, (3, 14), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 10:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    logits: Tensor = model(**questions(), use_cache=False).logits
    return logits


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_text_model_computes_what_the_whole_does(folders: dict[str, Path], layout: str):
    folder, settings = opened(folders[layout])
    stem, fields, text, _ = WHOLES[layout.removesuffix("-new")]
    assert folder.architecture.model_type == folder.config.model_type == text["model_type"]
    assert folder.multimodal is not None
    assert folder.multimodal.model_type == stem.lower()
    assert any(name.startswith("language_model.") for name in folder.tensor_names) is not layout.endswith("-new")
    model = load_dense(folder, settings)
    assert type(model).__name__ == folder.architecture.model_class
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) is fields[
        "tie_word_embeddings"
    ]
    logits = logits_of(model)
    assert torch.equal(logits, logits_of(whole_model(folders[layout])))
    assert 0.2 < logits.std() < 20


def test_nothing_of_the_vision_tower_is_read(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    """Integers among its tensors, as older vision towers have, are no obstacle."""
    for layout in LAYOUTS:
        path = folders[layout]
        read: list[str] = []

        class Recorder:
            def __init__(self, file: Path, framework: str) -> None:
                self.tensors = load_file(file)

            def __enter__(self) -> Self:
                return self

            def __exit__(self, *_: object) -> None:
                return None

            def keys(self) -> list[str]:
                return list(self.tensors)

            def get_tensor(self, name: str, read: list[str] = read) -> Tensor:
                read.append(name)
                return self.tensors[name]

        folder, settings = opened(path)
        with monkeypatch.context() as patched:
            patched.setattr(checkpoint_files, "safe_open", Recorder)
            load_dense(folder, settings)
        text = {name for name in folder.tensor_names if "vision_tower" not in name and "projector" not in name}
        assert set(read) == text < folder.tensor_names
        assert len(read) == len(text)


def ranges_read(path: Path) -> tuple[dict[str, Tensor], list[tuple[int, int]]]:
    """Shard, and list the bytes of the file that this rank read."""
    read: list[tuple[int, int]] = []
    pread = slices.SliceReader._pread

    def noting(reader: Any, file: Path, count: int, offset: int) -> bytearray:
        read.append((offset, offset + count))
        return pread(reader, file, count, offset)

    slices.SliceReader._pread = noting
    try:
        return gathered(path, "float32"), read
    finally:
        slices.SliceReader._pread = pread


def test_each_rank_reads_its_part_of_the_text_model(two_ranks: Ranks, folders: dict[str, Path], tmp_path: Path):
    for layout in ("gemma3", "mistral_small-new"):
        path = Path(shutil.copytree(folders[layout], tmp_path / layout))
        weights = load_file(path / "model.safetensors")
        positions = f"{'model.' if layout.endswith('-new') else ''}vision_tower.embeddings.position_ids"
        save_file(weights | {positions: torch.arange(4)}, path / "model.safetensors", metadata={"format": "pt"})
        folder, settings = opened(path)
        expected = dict(load_dense(folder, settings).named_parameters(remove_duplicate=False))
        stored = slices.index_tensors(folder.files, folder.is_used)
        text_bytes = sum(one.numel() * 4 for one in dict(load_dense(folder, settings).named_parameters()).values())
        places = [(one.offset, one.offset + torch.Size(one.shape).numel() * 4) for one in stored.values()]
        for gathered_weights, read in two_ranks.run(ranges_read, path):
            assert gathered_weights.keys() == expected.keys()
            assert all(torch.equal(gathered_weights[name], tensor) for name, tensor in expected.items())
            assert all(any(begin <= low and high <= end for begin, end in places) for low, high in read)
            # Half of each tensor, and once more the sample by which a shard is checked.
            assert sum(high - low for low, high in read) <= text_bytes / 2 + len(expected) * 64 * 4


@pytest.mark.parametrize("layout", ["gemma3", pytest.param("ministral3-new", marks=pytest.mark.long)])
def test_two_ranks_train_as_one_process(
    two_ranks: Ranks, folders: dict[str, Path], tasks: list[str], tmp_path: Path, layout: str
):
    changes = {"training": {"steps": 3, "batch_size": 8, "micro_batch_size": 4, "optimizer": {"warmup_steps": 1}}}
    sharded, alone = recipes(folders[layout], tasks, tmp_path, changes)
    assert_same_training(*two_ranks.run(train, sharded), train(alone))


def exported(folder: Path, adapter: dict[str, Any], tasks: list[str], output: Path) -> tuple[AdaptedModel, Path]:
    """Write the bundle of one task of a disturbed generator."""
    model = tiny.adapted_model(folder, {"adapters": [adapter]}, num_tasks=3)
    tiny.disturb(model.generator, std=0.2)
    recipe = make_recipe(folder, tasks, output, adaptation={"adapters": [adapter]})
    opened_folder, _ = opened(folder)
    backbone = {
        "name": str(folder),
        "path": str(folder),
        "is_local": True,
        "digest": opened_folder.digest(),
        "model_type": opened_folder.architecture.model_type,
        "multimodal": opened_folder.multimodal and opened_folder.multimodal.model_type,
    }
    loaded = tuple(one.task for one in corpus_of(recipe).tasks)
    trained = TrainedGenerator(recipe, model.site_map, model.generator, loaded, backbone, 1, (None,) * 3)
    return model, export_bundles(trained, output, only=["past"])["past"]


@torch.no_grad()
def adapted_logits(model: AdaptedModel, task: int) -> Tensor:
    with model.adapting(torch.tensor([task])):
        return logits_of(model.backbone)


VLLM = {
    # hf_to_vllm_mapper.orig_to_new_prefix of vLLM's Gemma3ForConditionalGeneration; Mistral 3's begins alike
    "model.language_model.": "language_model.model.",
    "model.vision_tower.": "vision_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "lm_head.": "language_model.lm_head.",
}


def name_in_vllm(tensor: str) -> str:
    """Return the module of vLLM that a tensor of an adapter is for, as `parse_fine_tuned_lora_name` finds it."""
    name = tensor.removeprefix("base_model.model.")
    for own, theirs in VLLM.items():
        if name.startswith(own):
            name = name.replace(own, theirs, 1)
    return ".".join(name.split(".")[:-2])


@pytest.mark.parametrize("adapter", [LORA, {"kind": "ia3"}], ids=["lora", "ia3"])
@pytest.mark.parametrize("layout", ["gemma3", "mistral_small-new", "ministral3"])
def test_bundles_fit_the_whole_model(
    folders: dict[str, Path], tasks: list[str], tmp_path: Path, layout: str, adapter: dict[str, Any]
):
    folder = folders[layout]
    model, bundle = exported(folder, adapter, tasks, tmp_path)
    expected = adapted_logits(model, 1)
    whole = whole_model(folder)
    tensors = load_file(bundle / "adapter_model.safetensors")
    adapted = PeftModel.from_pretrained(whole, bundle).eval()
    assert get_peft_model_state_dict(adapted).keys() == tensors.keys()  # none of the vision tower's
    tolerance = 1e-6 if adapter["kind"] == "lora" else 1e-5  # (IA)³ rounds 1 + δ, then multiplies
    assert (logits_of(adapted) - expected).abs().max() <= tolerance * max(1.0, float(expected.abs().max()))
    assert (expected - logits_of(model.backbone)).abs().max() > 1e-2
    assert all(name.startswith("base_model.model.model.language_model.layers.") for name in tensors)
    if adapter["kind"] == "lora":
        assert {name_in_vllm(name) for name in tensors} == {
            f"language_model.{site.name}" for site in model.site_map.sites
        }

    # A bundle is read back onto the text model.
    loaded = load_bundles([bundle])
    assert loaded.manifests[0].backbone.multimodal == WHOLES[layout.removesuffix("-new")][0].lower()
    assert (adapted_logits(loaded.model, 0) - expected).abs().max() <= 1e-5


def test_a_prefix_stays_native(folders: dict[str, Path], tasks: list[str], tmp_path: Path):
    model, bundle = exported(folders["gemma3"], {"kind": "prefix", "length": 3}, tasks, tmp_path)
    loaded = load_bundles([bundle])
    assert loaded.manifests[0].format == "native"
    assert torch.equal(adapted_logits(loaded.model, 0), adapted_logits(model, 1))


def planned(recipe: Recipe) -> Any:
    return plan_recipe(recipe, PlanOptions(gpus=2, nodes=1, gpu_memory=2**34, bandwidth=None, rate=None))


def test_a_config_is_enough_for_a_plan(folders: dict[str, Path], tasks: list[str], tmp_path: Path):
    for name in WHOLES:
        (tmp_path / name).mkdir()
        shutil.copy(folders[name] / "config.json", tmp_path / name)
        recipe = make_recipe(folders[name], tasks, tmp_path, engine={"kind": "zero"}, cluster={"workers": 2})
        alone = make_recipe(tmp_path / name, tasks, tmp_path, engine={"kind": "zero"}, cluster={"workers": 2})
        folder, settings = opened(folders[name])
        shapes = open_shapes(alone.backbone)
        assert shapes.multimodal == folder.multimodal
        workload = describe_run(alone, shapes)
        assert workload == describe_run(recipe, folder)
        text = sum(one.numel() for one in load_dense(folder, settings).parameters())
        assert sum(part.numel for part in workload.parts) == text
    assert planned(alone).backbone_parameters == text


def test_a_published_config_says_less(folders: dict[str, Path], tmp_path: Path):
    """Mistral Small's names no `tie_word_embeddings`: the text model's class then decides, as in transformers 4."""
    for name, is_tied in (("mistral_small", False), ("gemma3", True)):
        (tmp_path / name).mkdir()
        described = json.loads((folders[name] / "config.json").read_text())
        del described["tie_word_embeddings"], described["text_config"]["tie_word_embeddings"]
        (tmp_path / name / "config.json").write_text(json.dumps(described))
        assert open_shapes(BackboneSettings(name=str(tmp_path / name))).config.tie_word_embeddings is is_tied


def test_the_digest_knows_the_text_model(folders: dict[str, Path], tmp_path: Path):
    folder, _ = opened(folders["gemma3"])
    copy = rename(folders["gemma3"], tmp_path / "copy")
    assert opened(copy)[0].digest() == folder.digest() != opened(folders["gemma3-new"])[0].digest()
    weights = load_file(copy / "model.safetensors")
    name = "language_model.model.layers.1.mlp.up_proj.weight"
    save_file(weights | {name: weights[name] + 1}, copy / "model.safetensors", metadata={"format": "pt"})
    assert opened(copy)[0].digest() != folder.digest()


def test_what_is_missing_is_named(folders: dict[str, Path], tmp_path: Path):
    copy = rename(folders["gemma3"], tmp_path / "copy", (r"layers\.1\.mlp\.up_proj", "layers.1.mlp.lost"))
    with pytest.raises(BackboneError, match=r"holds the tensor 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        load_dense(*opened(copy))
    weights = load_file(folders["gemma3"] / "model.safetensors")
    name = "language_model.model.layers.1.mlp.up_proj.weight"
    save_file(weights | {name: weights[name][1:].contiguous()}, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BackboneError, match=rf"tensor '{re.escape(name)}' .* has another shape"):
        load_dense(*opened(copy))


def test_a_whole_model_in_memory_is_an_error(folders: dict[str, Path]):
    with pytest.raises(
        BackboneError, match=r"'gemma3' models are multimodal, and only their text model can be adapted"
    ):
        hs.adapt(whole_model(folders["gemma3"]), [hs.LoraSettings()], num_tasks=2)


@pytest.mark.long
def test_the_commands(folders: dict[str, Path], tasks: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    recipe = make_recipe(folders["gemma3"], tasks, tmp_path / "run", adaptation={"adapters": [LORA]})
    train_in_process(recipe, resume=False)
    written = tmp_path / "recipe.yaml"
    written.write_text(json.dumps(recipe.model_dump(mode="json")))
    for words in (("plan", written), ("export", tmp_path / "run", "--output", tmp_path / "bundles")):
        done = run(capsys, *words)
        assert done.code == 0, done.err
    manifest = json.loads((tmp_path / "bundles" / "past" / "hyperscale.json").read_text())
    assert manifest["backbone"]["multimodal"] == "gemma3"
    assert manifest["format"] == "peft"
    assert len(AutoTokenizer.from_pretrained(folders["gemma3"])) == 400
    with pytest.raises(BundleError):
        load_bundles([tmp_path / "bundles" / "past"], backbone=str(folders["mistral_small"]))
