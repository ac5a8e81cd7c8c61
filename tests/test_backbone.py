"""Finding, describing and loading a frozen backbone, and the errors where that fails."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoTokenizer

from hyperscale.config.backbone import BackboneSettings
from hyperscale.errors import BackboneError
from hyperscale.model.architectures import ARCHITECTURES
from hyperscale.model.backbone import DTYPES, BackboneFolder, build_empty, load_dense, open_backbone, prepare_config
from tests import tiny


def settings(folder: Path | str, **fields: object) -> BackboneSettings:
    return BackboneSettings.model_validate({"name": str(folder), "dtype": "float32"} | fields)


def opened(folder: Path) -> BackboneFolder:
    return open_backbone(settings(folder))


def opening_error(folder: Path | str) -> str:
    with pytest.raises(BackboneError) as caught:
        open_backbone(settings(folder))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(params=["llama", "t5", "t5 v1.0"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A backbone of each kind of head: tied, of its own, tied and scaled."""
    match request.param:
        case "llama":
            return request.getfixturevalue("tiny_llama_folder")
        case "t5":
            return request.getfixturevalue("tiny_t5_folder")
        case _:
            return tiny.tiny_t5(tmp_path / "t5", tie_word_embeddings=True, feed_forward_proj="relu")


def test_tiny_backbones_match_their_tokenizers(tiny_llama_folder: Path, tiny_t5_folder: Path):
    for path in (tiny_llama_folder, tiny_t5_folder):
        tokenizer = AutoTokenizer.from_pretrained(path)
        folder = opened(path)
        assert folder.config.vocab_size == len(tokenizer)
        assert (folder.config.eos_token_id, folder.config.pad_token_id) == (
            tokenizer.eos_token_id,
            tokenizer.pad_token_id,
        )
        assert max(tokenizer("Any text: naïve, 5 + 3 = 8?\n")["input_ids"]) < len(tokenizer)
        model = load_dense(folder, settings(path))
        ids = torch.arange(40).view(2, 20)
        logits = model(**{"input_ids": ids} | ({"decoder_input_ids": ids} if "t5" in path.name else {})).logits
        assert 0.5 < logits.std() < 2
    # a real SentencePiece model: its pieces, then T5's sentinels in reverse
    t5 = AutoTokenizer.from_pretrained(tiny_t5_folder)
    assert t5.convert_tokens_to_ids("<extra_id_0>") == len(t5) - 1
    assert t5.decode(t5("Review: a fine film")["input_ids"], skip_special_tokens=True) == "Review: a fine film"
    llama = AutoTokenizer.from_pretrained(tiny_llama_folder)
    assert llama.apply_chat_template(
        [{"role": "user", "content": "Hello"}], tokenize=False, add_generation_prompt=True
    ) == ("<|user|>\nHello</s>\n<|assistant|>\n")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_empty_backbone_is_the_loaded_one_without_its_weights(folder: Path, dtype: str):
    backbone, chosen = opened(folder), settings(folder, dtype=dtype)
    loaded, empty = load_dense(backbone, chosen), build_empty(backbone, chosen)
    assert nn.Module.register_parameter.__module__ == "torch.nn.modules.module"  # the patch is gone

    def tied(model: nn.Module) -> list[tuple[str, ...]]:
        names: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        return [tuple(group) for group in names.values()]

    assert tied(empty) == tied(loaded)
    for (name, parameter), (other, reference) in zip(empty.named_parameters(), loaded.named_parameters(), strict=True):
        assert (name, parameter.shape, parameter.dtype) == (other, reference.shape, reference.dtype)
        assert parameter.is_meta
        assert not parameter.requires_grad
        assert not reference.requires_grad
    for (name, buffer), (other, reference) in zip(empty.named_buffers(), loaded.named_buffers(), strict=True):
        assert name == other
        torch.testing.assert_close(buffer, reference, rtol=0, atol=0)
    assert not empty.training
    assert not loaded.training

    # With the stored tensors put in by name the two compute the same.
    stored = {name: tensor.to(DTYPES[dtype]) for name, tensor in load_file(folder / "model.safetensors").items()}
    for names in tied(empty):
        name = next(name for name in names if name in stored)
        parameter = nn.Parameter(stored[name], requires_grad=False)
        for each in names:
            owner, _, key = each.rpartition(".")
            empty.get_submodule(owner).register_parameter(key, parameter)
    ids = torch.arange(3, 15).view(2, 6)
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if backbone.architecture.is_encoder_decoder else {})
    assert torch.equal(empty(**inputs).logits, loaded(**inputs).logits)


def test_heads_are_tied_as_the_checkpoint_has_them(tiny_llama_folder: Path, tiny_t5_folder: Path, tmp_path: Path):
    def heads(path: Path) -> list[bool]:
        models = [make(opened(path), settings(path)) for make in (load_dense, build_empty)]
        return [model.get_output_embeddings().weight is model.get_input_embeddings().weight for model in models]

    assert heads(tiny_llama_folder) == [True, True]
    assert heads(tiny.tiny_llama(tmp_path / "untied", tie_word_embeddings=False)) == [False, False]
    assert heads(tiny_t5_folder) == [False, False]  # v1.1, whatever its configuration says
    assert heads(tiny.tiny_t5(tmp_path / "v1.0", tie_word_embeddings=True)) == [True, True]


def test_dropout_is_the_recipes(tiny_llama_folder: Path, tiny_t5_folder: Path):
    for path in (tiny_llama_folder, tiny_t5_folder):
        folder = opened(path)
        for dropout in (0.0, 0.25):
            chosen = settings(path, dropout=dropout)
            for model in (load_dense(folder, chosen), build_empty(folder, chosen)):
                assert model.training is (dropout > 0)
                rates = {module.p for module in model.modules() if isinstance(module, nn.Dropout)}
                assert rates <= {dropout}
            config = prepare_config(folder, chosen)
            assert getattr(config, "attention_dropout", config.to_dict().get("dropout_rate")) == dropout
        assert folder.config.to_dict().get("dropout_rate", 0.1) == 0.1  # the folder's own is left alone


def test_digest_knows_the_model_and_not_the_place(tiny_llama_folder: Path, tmp_path: Path):
    digest = opened(tiny_llama_folder).digest()
    copy = Path(shutil.copytree(tiny_llama_folder, tmp_path / "elsewhere"))
    assert opened(copy).digest() == digest
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"transformers_version": "9.9.9"}, indent=4))
    assert opened(copy).digest() == digest
    (copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-4}))
    assert opened(copy).digest() != digest
    (copy / "config.json").write_text(json.dumps(config))
    # another fine-tune of the same shape
    tensors = load_file(copy / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, copy / "model.safetensors", {"format": "pt"})
    assert opened(copy).digest() != digest


def test_weights_in_several_files(tiny_llama_folder: Path, tmp_path: Path):
    model = load_dense(opened(tiny_llama_folder), settings(tiny_llama_folder))
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    folder = opened(tmp_path)
    assert len(folder.files) > 2
    assert folder.tensor_names == opened(tiny_llama_folder).tensor_names
    again = load_dense(folder, settings(tmp_path))
    assert all(map(torch.equal, model.parameters(), again.parameters()))
    folder.files[1].unlink()
    assert f"lacks {folder.files[1].name} (1 of {len(folder.files)} files are missing)" in opening_error(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    assert "model.safetensors.index.json is damaged" in opening_error(tmp_path)


def test_a_wrong_folder_gives_one_clear_error(tiny_llama_folder: Path, tmp_path: Path):
    assert "'smollm2-135m' is neither a folder nor a packaged backbone" in opening_error("smollm2-135m")
    assert "Did you mean 'smollm2-135m-instruct'?" in opening_error("smollm2-135m")
    assert "is neither a folder" in opening_error(tmp_path / "missing")

    assert f"has no config.json in {tmp_path}; give a folder saved by save_pretrained" in opening_error(tmp_path)
    config = tmp_path / "config.json"
    config.write_text("{")
    assert f"{config} is not a model's configuration: " in opening_error(tmp_path)
    config.write_text("[]")
    assert "it names no model_type" in opening_error(tmp_path)
    for model_type in ("bert", "llamma", "not-in-transformers"):
        config.write_text(json.dumps({"model_type": model_type}))
        message = opening_error(tmp_path)
        assert f"backbones of type '{model_type}' are not supported; supported: {', '.join(ARCHITECTURES)}" in message
        assert ("Did you mean 'llama'?" in message) is (model_type == "llamma")
    config.write_text(json.dumps({"model_type": "llama", "hidden_size": "wide"}))
    assert "hidden_size" in opening_error(tmp_path)

    shutil.copy(tiny_llama_folder / "config.json", config)
    assert f"{tmp_path} holds no weights; hyperscale reads safetensors" in opening_error(tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    message = opening_error(tmp_path)
    assert "holds only pytorch_model.bin, which is pickled" in message
    assert f"transformers.LlamaForCausalLM.from_pretrained('{tmp_path}').save_pretrained('NEW_FOLDER')" in message

    weights = (tiny_llama_folder / "model.safetensors").read_bytes()
    for damaged in (b"", b"not safetensors at all", weights[: len(weights) // 2]):
        (tmp_path / "model.safetensors").write_bytes(damaged)
        assert "is not a safetensors file or is truncated" in opening_error(tmp_path)


def test_a_hub_id_without_a_network_fails_at_once(monkeypatch: pytest.MonkeyPatch):
    """In offline mode the hub's client looks up no name and retries nothing."""
    lookups: list[object] = []
    monkeypatch.setattr("socket.getaddrinfo", lambda *host, **_: lookups.append(host))
    message = opening_error("some-owner/some-model")
    assert "'some-owner/some-model' is not a folder here and could not be fetched from the model hub" in message
    assert lookups == []
