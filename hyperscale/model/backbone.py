"""Finding, describing and loading a frozen backbone."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    StrictDataclassError,
)
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from hyperscale.assets.backbones import PACKAGED, resolve_packaged
from hyperscale.assets.network import may_recover
from hyperscale.config.backbone import BackboneSettings
from hyperscale.errors import BackboneError, nearest
from hyperscale.model.architectures import Architecture, architecture_of
from hyperscale.model.attention import GROUPED
from hyperscale.model.checkpoint_files import fill_parameters, tensor_names, weight_files
from hyperscale.model.checkpoints import keep_on_host
from hyperscale.model.families.multimodal import Multimodal, multimodal_of
from hyperscale.model.quantized.blocks import quantize_backbone
from hyperscale.model.stored_names import stored_as

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_DROPOUTS = ("dropout_rate", "attention_dropout", "resid_pdrop", "embd_pdrop")
"""What the families call the rates of their dropouts."""
_DIGEST_SAMPLES = 1024
"""How many samples of 64 bytes each file contributes to its digest."""


@dataclass(frozen=True)
class BackboneFolder:
    """A backbone on this machine's disk."""

    name: str
    """The name in the recipe."""
    path: Path
    config: Any
    """The transformers configuration."""
    architecture: Architecture
    files: tuple[Path, ...]
    """Its safetensors files."""
    tensor_names: frozenset[str]
    """The names of the tensors in these files."""
    multimodal: Multimodal | None = None
    """The checkpoint around the backbone, if the backbone is its text model."""

    def stored_as(self, name: str) -> tuple[str, ...]:
        """Return the names in the files of the tensors that make a parameter, in order; none if the files lack it."""
        return stored_as(name, self.tensor_names, self.architecture, self.multimodal)

    def is_used(self, stored: str) -> bool:
        """Return whether a tensor of the files may belong to the backbone."""
        return self.multimodal is None or self.multimodal.holds_text(stored)

    @property
    def model_class(self) -> type[PreTrainedModel]:
        model_class: type[PreTrainedModel] = getattr(transformers, self.architecture.model_class)
        return model_class

    @property
    def has_fused_attention(self) -> bool:
        """Whether PyTorch's fused kernel computes this family's attention."""
        return bool(self.model_class._supports_sdpa)

    def digest(self) -> str:
        """Return a sha256 of config.json and of each file's tensor table, size and a sample of its weights.

        It depends neither on the folder's path nor on the version of transformers. The sample distinguishes fine-tuned
        variants of one model without reading gigabytes.
        """
        described = json.loads((self.path / "config.json").read_text(encoding="utf-8"))
        for key in ("_name_or_path", "transformers_version"):
            described.pop(key, None)
        sha = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
        for file in self.files:
            size = file.stat().st_size
            sha.update(str(size).encode())
            with file.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                sha.update(stream.read(length))
                for sample in range(_DIGEST_SAMPLES):
                    stream.seek(8 + length + (size - 8 - length) * sample // _DIGEST_SAMPLES)
                    sha.update(stream.read(64))
        return sha.hexdigest()


def open_backbone(settings: BackboneSettings) -> BackboneFolder:
    """Locate a backbone; download a packaged name or a hub id that is not on this machine yet.

    Raises:
        BackboneError: no such backbone, an unsupported family, no weights, or weights that are not safetensors.
    """
    path = _locate(settings)
    if not (path / "config.json").is_file():
        raise BackboneError(
            f"backbone.name: '{settings.name}' has no config.json in {path}; give a folder saved by save_pretrained"
        )
    architecture, config, multimodal = _read_config(path / "config.json")
    files = weight_files(path)
    if not files:
        pickled = sorted(item.name for item in path.glob("*.bin"))
        contents = f"only {', '.join(pickled[:3])}, which is pickled" if pickled else "no weights"
        raise BackboneError(
            f"backbone.name: {path} holds {contents}; hyperscale reads safetensors. Convert with: "
            f'python -c "import transformers; transformers.{architecture.model_class}'
            f".from_pretrained('{path}').save_pretrained('NEW_FOLDER')\""
        )
    return _tied_as_stored(
        BackboneFolder(settings.name, path, config, architecture, files, tensor_names(files), multimodal)
    )


def open_shapes(settings: BackboneSettings) -> BackboneFolder:
    """Locate a backbone for its shapes: a config.json is enough, and no weights are downloaded.

    Raises:
        BackboneError: no such backbone, or an unsupported family.
    """
    path = _locate(settings, patterns=["config.json"])
    if not (path / "config.json").is_file():
        raise BackboneError(f"backbone.name: '{settings.name}' has no config.json in {path}")
    architecture, config, multimodal = _read_config(path / "config.json")
    has_weights = bool(list(path.glob("*.safetensors")))
    names = tensor_names(weight_files(path)) if has_weights else _untied_names(path, architecture)
    return _tied_as_stored(BackboneFolder(settings.name, path, config, architecture, (), names, multimodal))


def _tied_as_stored(folder: BackboneFolder) -> BackboneFolder:
    """Tie the head of a multimodal checkpoint's text model unless the files hold one.

    config.json says it of the whole model, whose class has another default than that of the text model.
    """
    if folder.multimodal and folder.tensor_names:
        folder.config.tie_word_embeddings = not folder.stored_as(folder.multimodal.head)
    return folder


def _untied_names(path: Path, architecture: Architecture) -> frozenset[str]:
    """Return the names of a T5's untied weights: transformers 5 ignores `tie_word_embeddings: false` in config.json."""
    described = json.loads((path / "config.json").read_text(encoding="utf-8"))
    is_untied = architecture.may_untie_head and described.get("tie_word_embeddings") is False
    return frozenset({"shared.weight", "lm_head.weight"} if is_untied else ())


def _read_config(path: Path) -> tuple[Architecture, Any, Multimodal | None]:
    """Return the family, the configuration and, where it is a part of one, the multimodal checkpoint of a backbone."""
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(described, dict) or "model_type" not in described:
            raise ValueError("it names no model_type")
        _check_unquantized(path, described)
        multimodal = multimodal_of(described["model_type"])
        if multimodal is None:
            architecture = architecture_of(described["model_type"])  # first, because AutoConfig's own error is long
            return architecture, AutoConfig.from_pretrained(path.parent), None
        whole = AutoConfig.from_pretrained(path.parent)
        config = whole.get_text_config()
        if "tie_word_embeddings" in described:
            config.tie_word_embeddings = whole.tie_word_embeddings
        return architecture_of(config.model_type), config, multimodal
    except (ValueError, TypeError, OSError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise BackboneError(f"backbone.name: {path} is not a model's configuration: {reason}") from error


def _check_unquantized(path: Path, described: Mapping[str, Any]) -> None:
    quantized = described.get("quantization_config")
    if quantized:
        method = quantized.get("quant_method", "an unnamed method") if isinstance(quantized, dict) else quantized
        raise BackboneError(
            f"backbone.name: the weights in {path.parent} are quantized already ({method}); give a checkpoint of the "
            "same model in bf16, and set backbone.quantization to hold it in fewer bits"
        )


_WHOLE = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


def _locate(settings: BackboneSettings, patterns: Sequence[str] = _WHOLE) -> Path:
    if settings.name in PACKAGED:
        return resolve_packaged(settings.name)
    local = Path(settings.name)
    if local.is_dir():
        return local
    if local.is_absolute() or settings.name.count("/") != 1:
        packaged = ", ".join(PACKAGED)
        raise BackboneError(
            f"backbone.name: '{settings.name}' is neither a folder nor a packaged backbone ({packaged}) "
            "nor a hub id (owner/name)." + nearest(settings.name, PACKAGED)
        )
    try:
        return Path(snapshot_download(settings.name, revision=settings.revision, allow_patterns=list(patterns)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BackboneError(
            f"backbone.name: '{settings.name}' is not a folder here and could not be fetched from the model hub "
            f"({type(error).__name__}: {reason}). Check the name and the network, set HF_TOKEN for a gated model, "
            "or give a folder",
            is_transient=may_recover(error),
        ) from error


def prepare_config(folder: BackboneFolder, settings: BackboneSettings) -> Any:
    """Return a copy of the backbone's configuration with the recipe's dropout and attention.

    Raises:
        BackboneError: `backbone.attention` is the fused kernel, which cannot compute this family's attention.
    """
    config = type(folder.config).from_dict(folder.config.to_dict())
    for name in _DROPOUTS:
        if hasattr(config, name):
            setattr(config, name, settings.dropout)
    if settings.attention == "sdpa" and not folder.has_fused_attention:
        raise BackboneError(
            f"backbone.attention: the fused kernel 'sdpa' cannot compute the attention of {folder.config.model_type} "
            "backbones, whose scores have a soft cap or sinks; set backbone.attention=auto"
        )
    if settings.attention != "auto":
        config._attn_implementation = settings.attention
    elif not (folder.has_fused_attention and torch.cuda.is_available()):
        # Measured on 2 cores, SmolLM2-135M in bf16, 8 x 46 tokens: a step takes 0.7 of the time with the fused kernel.
        is_grouped = getattr(config, "num_key_value_heads", None) not in (None, config.num_attention_heads)
        config._attn_implementation = GROUPED if is_grouped else "eager"
    return config


def build_empty(folder: BackboneFolder, settings: BackboneSettings) -> PreTrainedModel:
    """Build the frozen model without any weights: parameters on the meta device, buffers real."""
    return _freeze(_build_unfilled(folder, settings), folder, settings)


def _build_unfilled(folder: BackboneFolder, settings: BackboneSettings) -> PreTrainedModel:
    config = prepare_config(folder, settings)
    with _parameters_on_meta():
        model: PreTrainedModel = folder.model_class._from_config(config, dtype=DTYPES[settings.dtype])
    model.tie_weights()
    _untie_stored_head(model, folder)
    return model


def _untie_stored_head(model: PreTrainedModel, folder: BackboneFolder) -> None:
    """Give the head its own weight if the checkpoint holds one.

    Every T5 v1.1 and Flan-T5 checkpoint does, although transformers 5 sets `tie_word_embeddings` in all T5
    configurations. Its `from_pretrained` unties them in the same way once it has read the weights.
    """
    head: Any = model.get_output_embeddings()
    tied = {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter is head.weight}
    of_head = {f"{name}.weight" for name, module in model.named_modules() if module is head}
    if any(map(folder.stored_as, of_head)) and any(map(folder.stored_as, tied - of_head)):
        head.weight = nn.Parameter(torch.empty_like(head.weight), requires_grad=False)


def load_dense(folder: BackboneFolder, settings: BackboneSettings) -> PreTrainedModel:
    """Load the whole frozen model into this process (for reference; the zero engine loads shards)."""
    if folder.multimodal:
        text_model = _build_unfilled(folder, settings)
        fill_parameters(text_model, folder.files, folder.stored_as)
        return _freeze(text_model, folder, settings)
    transformers.utils.logging.disable_progress_bar()  # our own display shows the loading
    model = folder.model_class.from_pretrained(
        folder.path, config=prepare_config(folder, settings), dtype=DTYPES[settings.dtype]
    )
    return _freeze(model, folder, settings)


def _freeze(model: PreTrainedModel, folder: BackboneFolder, settings: BackboneSettings) -> PreTrainedModel:
    model.requires_grad_(False)
    quantize_backbone(model, folder.architecture, settings.quantization)
    model.train(settings.dropout > 0)
    return model


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Drop each parameter's storage as it is registered; buffers (rotary frequencies) keep theirs."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        # A parameter that is already on meta is a tied weight. It must stay the same object.
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def set_activation_checkpointing(backbone: PreTrainedModel, offload: bool = False) -> None:
    """Recompute every block in the backward pass. This sets training mode; dropout stays as configured.

    With `offload` the blocks' inputs wait in host memory.
    """
    # transformers renamed the method after our oldest version, and newer versions warn about the old name
    enable = getattr(backbone, "activation_checkpointing_enable", None) or backbone.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    # transformers then requires gradients of the embedding's output, and ZeRO-3 would gather the embedding once more.
    backbone.disable_input_require_grads()
    backbone.train()
    if offload:
        keep_on_host(backbone)
