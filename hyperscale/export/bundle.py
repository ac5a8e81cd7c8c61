"""A bundle: one task, exported. A folder of tensors and of everything needed to answer rows with it.

<bundle>/hyperscale.json                                    the manifest below, with a sha256 of every other file
<bundle>/recipe.yaml                                        the resolved recipe of the run
<bundle>/adapter_config.json + adapter_model.safetensors    format `peft`: what PEFT and vLLM load
<bundle>/weights.safetensors                                format `native`: every kind of adapter
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from hyperscale.config.adaptation import AdapterSettings
from hyperscale.config.backbone import Quantization
from hyperscale.config.problems import describe
from hyperscale.config.section import Section
from hyperscale.data.tasks import Task
from hyperscale.errors import BundleError

MANIFEST = "hyperscale.json"
FORMAT_VERSION: Literal[1] = 1


class BundleBackbone(Section):
    """The backbone that a bundle adapts."""

    name: str
    revision: str | None = None
    """Branch, tag or commit of a hub id; bundles written before it was recorded have none."""
    digest: str
    dtype: Literal["bfloat16", "float32"]
    quantization: Quantization = "none"
    model_type: str
    multimodal: str | None = None
    """`model_type` of the multimodal checkpoint whose text model this is; None of a checkpoint of text alone."""


class BundleManifest(Section):
    """The contents of `hyperscale.json`."""

    version: Literal[1] = FORMAT_VERSION
    format: Literal["peft", "native"]
    task: Task
    backbone: BundleBackbone
    adapters: tuple[AdapterSettings, ...]
    sites: tuple[dict[str, Any], ...]
    """The site map, in order."""
    max_source_tokens: int
    too_long: Literal["drop", "error", "truncate_source"]
    run: str
    step: int
    produced_by: str
    files: dict[str, str]
    """File name -> sha256."""


def write_manifest(folder: Path, manifest: BundleManifest) -> None:
    """Write the manifest with the digests of the files that are in `folder` already."""
    digests = {path.name: file_digest(path) for path in sorted(folder.iterdir())}
    complete = manifest.model_copy(update={"files": digests})
    text = json.dumps(complete.model_dump(mode="json"), indent=2, ensure_ascii=False)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> BundleManifest:
    """Read and check a bundle's manifest and files.

    Raises:
        BundleError: no bundle, one of another version, or a file that is missing or damaged.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise BundleError(
            f"{folder} is not a bundle: it has no {MANIFEST}. Give a folder that 'hyperscale export' or a run wrote"
        )
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BundleError(f"{path} is not valid JSON: {error}; export the bundle again") from error
    if isinstance(raw, dict) and raw.get("version") != FORMAT_VERSION:
        raise BundleError(
            f"{path}: bundle version {raw.get('version')!r}; this hyperscale reads version {FORMAT_VERSION}"
        )
    try:
        manifest = BundleManifest.model_validate(raw)
    except ValidationError as error:
        raise BundleError("\n".join(describe(error, BundleManifest, str(path)))) from error
    _check_files(folder, manifest.files)
    return manifest


def _check_files(folder: Path, files: Mapping[str, str]) -> None:
    for name, digest in files.items():
        if not (folder / name).is_file():
            raise BundleError(f"bundle {folder} lacks the file {name}; export it again")
        if file_digest(folder / name) != digest:
            raise BundleError(
                f"bundle {folder}: {name} is damaged (its sha256 is not the one in {MANIFEST}); export it again"
            )


def file_digest(path: Path) -> str:
    """Return a file's sha256 in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
