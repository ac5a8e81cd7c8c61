"""A saved generator: a small folder that makes every known task's adapters. docs/generator_format.md describes it.

<folder>/config.json             the format and its version, backbone, adaptation, sites, tasks, runs
<folder>/generator.safetensors   the generator's tensors, as a checkpoint holds them
<folder>/README.md               the model card
<folder>/SHA256SUMS              the sha256 of each file above, as `sha256sum --check` reads them
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hyperscale.checkpoint.store import Checkpoint
from hyperscale.config.adaptation import AdaptationSettings
from hyperscale.config.backbone import Quantization
from hyperscale.config.problems import describe
from hyperscale.config.section import Section
from hyperscale.errors import BundleError
from hyperscale.export.bundle import file_digest
from hyperscale.export.exporter import TaskOrigin, TrainedGenerator, restore_generator
from hyperscale.export.model_card import render_card
from hyperscale.export.portable import BackboneName, backbone_name, portable_recipe, portable_task
from hyperscale.export.replacement import whole_folder
from hyperscale.version import __version__

CONFIG = "config.json"
TENSORS = "generator.safetensors"
CARD = "README.md"
DIGESTS = "SHA256SUMS"
FILES = (CONFIG, TENSORS, CARD, DIGESTS)
FORMAT: Literal["hyperscale-generator"] = "hyperscale-generator"
FORMAT_VERSION: Literal[1] = 1


class SavedBackbone(BackboneName):
    """The backbone that the adapters belong to."""

    digest: str
    """sha256 of its weights."""
    model_type: str
    multimodal: str | None = None
    """`model_type` of the multimodal checkpoint whose text model this is; None of a checkpoint of text alone."""
    dtype: Literal["bfloat16", "float32"]
    quantization: Quantization


class SavedTask(Section):
    """One task that the generator knows."""

    task: dict[str, Any]
    """The task file's values: name, description, prompt, labels, metrics, …"""
    run: int
    """Position in `runs` of the run that made this task's weights."""
    scores: dict[str, float]
    """Metric -> validation score in percent at the end of the run; empty where it was not measured."""


class SavedRun(Section):
    """A run that trained the generator, or some of its tasks."""

    name: str
    step: int
    recipe: dict[str, Any]
    """The resolved recipe without `adaptation`, `tracking` and `cluster`; of every path, the last part."""


class GeneratorConfig(Section):
    """What `config.json` holds."""

    format: Literal["hyperscale-generator"] = FORMAT
    format_version: Literal[1] = FORMAT_VERSION
    produced_by: str
    backbone: SavedBackbone
    adaptation: AdaptationSettings
    sites: tuple[dict[str, Any], ...]
    """The site map, in order."""
    tasks: tuple[SavedTask, ...]
    """In the order of the generator's task numbers."""
    runs: tuple[SavedRun, ...]
    """The first is the run that was saved; others trained tasks that it left untouched."""


def is_generator_folder(folder: Path) -> bool:
    """Return whether a folder is a saved generator, whole or not."""
    if (folder / DIGESTS).is_file():
        return True
    try:
        raw = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(raw, dict) and raw.get("format") == FORMAT


def write_generator(trained: TrainedGenerator, folder: Path, licence: str = "unknown") -> Path:
    """Write a saved generator, replacing an earlier one in `folder` only when the new one is whole.

    Raises:
        BundleError: the folder holds other files, or cannot be written.
    """
    folder = folder.absolute()
    _require_own_folder(folder)
    with whole_folder(folder, "generator") as building:
        _fill(trained, building, licence)
    return folder


def read_generator(folder: Path) -> TrainedGenerator:
    """Check and read a saved generator, on the CPU; no backbone is needed.

    The model card may have been edited: its digest is not checked.

    Raises:
        BundleError: a file is missing or damaged, or the folder is of a newer version.
    """
    config = _read_config(folder)
    tensors = load_file(folder / TENSORS)
    first = config.runs[0]
    recipes = [{**run.recipe, "adaptation": config.adaptation.model_dump(mode="json")} for run in config.runs]
    origins = [
        {"recipe": recipes[task.run], "step": config.runs[task.run].step} if task.run else None for task in config.tasks
    ]
    backbone = config.backbone
    checkpoint = Checkpoint(
        step=first.step,
        tensors={"generator": {name: tensor.clone() for name, tensor in tensors.items()}},
        state={"tasks": [saved.task for saved in config.tasks], "origins": origins},
        manifest={
            "site_map": config.sites,
            "backbone": {
                "name": backbone.name,
                "path": backbone.name,
                "is_local": backbone.kind != "hub",
                "digest": backbone.digest,
                "model_type": backbone.model_type,
                "multimodal": backbone.multimodal,
                "quantization": backbone.quantization,
                "revision": backbone.revision,
            },
        },
        recipe=recipes[0],
    )
    try:
        trained = restore_generator(checkpoint)
    except (RuntimeError, KeyError, TypeError, IndexError, ValidationError) as error:
        reason = " ".join(str(error).split())
        raise BundleError(f"generator {folder}: {CONFIG} and {TENSORS} do not belong together: {reason}") from error
    return replace(trained, scores={saved.task["name"]: saved.scores for saved in config.tasks if saved.scores})


def _fill(trained: TrainedGenerator, folder: Path, licence: str) -> None:
    backbone = trained.backbone
    recipe = trained.recipe
    name = backbone_name(backbone["name"], backbone["is_local"], recipe.backbone.revision)
    runs, places = _runs(trained, name.name)
    config = GeneratorConfig(
        produced_by=f"hyperscale {__version__}",
        backbone=SavedBackbone(
            **name.model_dump(),
            digest=backbone["digest"],
            model_type=backbone["model_type"],
            multimodal=backbone.get("multimodal"),
            dtype=recipe.backbone.dtype,
            quantization=recipe.backbone.quantization,
        ),
        adaptation=recipe.adaptation,
        sites=tuple(trained.site_map.to_json()),
        tasks=tuple(
            SavedTask(task=portable_task(task), run=place, scores=dict(trained.scores.get(task.name, {})))
            for task, place in zip(trained.tasks, places, strict=True)
        ),
        runs=tuple(runs),
    )
    text = json.dumps(config.model_dump(mode="json"), indent=2, ensure_ascii=False)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
    state: Mapping[str, Tensor] = trained.generator.state_dict()
    save_file({key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}, folder / TENSORS)
    (folder / CARD).write_text(render_card(trained, name, licence), encoding="utf-8")
    digests = "".join(f"{file_digest(folder / file)}  {file}\n" for file in (CONFIG, TENSORS, CARD))
    (folder / DIGESTS).write_text(digests, encoding="utf-8")
    # Temporary folders and safetensors files are private; a server may run as another user.


def _runs(trained: TrainedGenerator, backbone: str) -> tuple[list[SavedRun], Sequence[int]]:
    """Return the distinct runs that trained the tasks, and each task's index among them."""
    runs = [_saved_run(TaskOrigin(trained.recipe, trained.step), backbone)]
    places = []
    for task in range(len(trained.tasks)):
        run = _saved_run(trained.origin_of(task), backbone)
        if run not in runs:
            runs.append(run)
        places.append(runs.index(run))
    return runs, places


def _saved_run(origin: TaskOrigin, backbone: str) -> SavedRun:
    recipe = portable_recipe(origin.recipe, backbone)
    del recipe["adaptation"]
    return SavedRun(name=origin.recipe.name, step=origin.step, recipe=recipe)


def _require_own_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise BundleError(f"{folder} is a file; choose another folder for the generator")
    others = sorted(path.name for path in folder.iterdir() if path.name not in FILES) if folder.is_dir() else []
    if others:
        raise BundleError(
            f"{folder} holds files that are not a saved generator's ({', '.join(others[:3])}), which would be lost; "
            "choose a new or empty folder"
        )


def _read_config(folder: Path) -> GeneratorConfig:
    path = folder / CONFIG
    advice = "save it again, or fetch it again from its source"
    for name in (CONFIG, TENSORS, DIGESTS):
        if not (folder / name).is_file():
            raise BundleError(f"generator {folder} is incomplete: it has no {name}; {advice}")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BundleError(f"generator {folder}: {CONFIG} is damaged: {error}; {advice}") from error
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise BundleError(
            f"generator {folder} has format version {version}; this hyperscale reads version {FORMAT_VERSION}. "
            "Install a newer hyperscale"
        )
    lines = (folder / DIGESTS).read_text(encoding="utf-8", errors="replace").splitlines()
    digests = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    for name in (CONFIG, TENSORS):
        if digests.get(name) != file_digest(folder / name):
            raise BundleError(
                f"generator {folder}: {name} is damaged (its sha256 is not the one in {DIGESTS}); {advice}"
            )
    try:
        config = GeneratorConfig.model_validate(raw)
    except ValidationError as error:
        raise BundleError("\n".join(describe(error, GeneratorConfig, str(path)))) from error
    return config
