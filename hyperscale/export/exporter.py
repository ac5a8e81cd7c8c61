"""From a checkpoint to one bundle per task.

Needs the generator and the site map only: no backbone weights are loaded.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hyperscale.checkpoint.store import Checkpoint
from hyperscale.config.adaptation import AdapterSettings
from hyperscale.config.loading import parse_recipe, recipe_without_destinations, render_recipe
from hyperscale.config.run import Recipe
from hyperscale.data.tasks import Task
from hyperscale.errors import BundleError, nearest
from hyperscale.export.bundle import BundleBackbone, BundleManifest, write_manifest
from hyperscale.export.native_format import write_native
from hyperscale.export.peft_format import peft_limitation, require_peft_support, write_peft
from hyperscale.export.replacement import whole_folder
from hyperscale.export.server_names import served_family, served_sites
from hyperscale.logger import get_logger
from hyperscale.model.adapters.kinds import ALL
from hyperscale.model.architectures import Architecture, architecture_of
from hyperscale.model.backbone import DTYPES
from hyperscale.model.build import Blueprint
from hyperscale.model.families.multimodal import Multimodal, multimodal_of
from hyperscale.model.generators.registry import stored_features
from hyperscale.model.sites import SiteMap
from hyperscale.model.weights import Weights
from hyperscale.training.evaluation import VALIDATION
from hyperscale.version import __version__

_logger = get_logger(__name__)


@dataclass(frozen=True)
class TaskOrigin:
    """The run that made a task's weights."""

    recipe: Recipe
    step: int


@dataclass(frozen=True)
class TrainedGenerator:
    """A checkpoint's generator, ready to make any of its tasks' weights."""

    recipe: Recipe
    site_map: SiteMap
    generator: nn.Module
    tasks: tuple[Task, ...]
    backbone: dict[str, Any]
    """`name`, `path`, `digest`, `model_type`, `multimodal` as the checkpoint's manifest has them."""
    step: int
    origins: tuple[TaskOrigin | None, ...]
    """For each task, the earlier run that trained its weights, or None if this run did."""
    scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Task -> metric -> validation score, where they were measured last."""

    def origin_of(self, task: int) -> TaskOrigin:
        """Return the run that made a task's weights."""
        return self.origins[task] or TaskOrigin(self.recipe, self.step)

    @property
    def architecture(self) -> Architecture:
        return architecture_of(self.backbone["model_type"])

    @property
    def multimodal(self) -> Multimodal | None:
        """The checkpoint around the backbone, if the backbone is its text model."""
        return multimodal_of(self.backbone.get("multimodal"))

    @torch.no_grad()
    def weights_of(self, task: int) -> Weights:
        """Return the fp32 weights of one task, K = 1."""
        weights: Weights = self.generator(torch.tensor([task]))
        return weights


def restore_generator(checkpoint: Checkpoint) -> TrainedGenerator:
    """Rebuild the generator of a checkpoint on the CPU."""
    recipe = parse_recipe(checkpoint.recipe, "the checkpoint's recipe")
    tasks = tuple(Task.model_validate(task) for task in checkpoint.state["tasks"])
    backbone = dict(checkpoint.manifest["backbone"])
    sites = checkpoint.manifest["site_map"]
    blueprint = Blueprint.of_sites(sites, backbone["model_type"], recipe.adaptation.adapters)
    tensors: dict[str, Tensor] = dict(checkpoint.tensors["generator"])
    features = stored_features(tensors)
    generator = blueprint.build_generator(recipe.adaptation, len(tasks), recipe.seed, features)
    generator.load_state_dict(tensors, strict=True)
    origins = tuple(map(_origin, checkpoint.state.get("origins") or [None] * len(tasks)))
    scores = _last_scores(checkpoint.state.get("evaluations", []))
    return TrainedGenerator(recipe, blueprint.site_map, generator, tasks, backbone, checkpoint.step, origins, scores)


def _last_scores(evaluations: Sequence[Mapping[str, Any]]) -> Mapping[str, Mapping[str, float]]:
    """Return the scores of the last evaluation on the validation rows, or nothing."""
    return next((one["scores"] for one in reversed(evaluations) if one["stage"] == VALIDATION), {})


def _origin(stored: Mapping[str, Any] | None) -> TaskOrigin | None:
    return (
        TaskOrigin(parse_recipe(stored["recipe"], "the recipe of an earlier run"), stored["step"]) if stored else None
    )


def export_bundles(
    trained: TrainedGenerator, output: Path, only: Sequence[str] = (), format: str | None = None
) -> dict[str, Path]:
    """Write a bundle per task into `output/<task>`, replacing an earlier one only when the new one is whole.

    Args:
        only: names of the tasks to write; empty = all.
        format: `auto`, `peft` or `native`; None = the format of the recipe.

    Raises:
        BundleError: an unknown task, a format that cannot express these adapters, or an output that cannot be written.
    """
    names = [task.name for task in trained.tasks]
    for name in only:
        if name not in names:
            raise BundleError(f"the checkpoint has no task '{name}'.{nearest(name, names)} It has: {', '.join(names)}")
    chosen = _choose_format(format or trained.recipe.export.format, trained)
    written = {}
    for index, task in enumerate(trained.tasks):
        if not only or task.name in only:
            written[task.name] = _write_bundle(trained, index, output / task.name, chosen)
    _logger.info("exported %d bundles (%s) to %s", len(written), chosen, output)
    return written


def _choose_format(requested: str, trained: TrainedGenerator) -> str:
    served = served_family(trained.architecture, trained.multimodal)
    if requested == "auto":
        return "native" if peft_limitation(trained.site_map, served) else "peft"
    if requested == "peft":
        require_peft_support(trained.site_map, served)
    return requested


def _write_bundle(trained: TrainedGenerator, index: int, target: Path, format: str) -> Path:
    with whole_folder(target, "bundle") as building:
        _fill(trained, index, building, format)
    return target


def _fill(trained: TrainedGenerator, index: int, folder: Path, format: str) -> None:
    recipe = trained.origin_of(index).recipe
    weights, dtype = trained.weights_of(index), DTYPES[recipe.export.dtype]
    if format == "peft":
        base = trained.backbone["path"] if trained.backbone["is_local"] else trained.backbone["name"]
        revision = None if trained.backbone["is_local"] else recipe.backbone.revision
        adapters = recipe.adaptation.adapters
        sites = served_sites(trained.site_map, trained.multimodal)
        served = served_family(trained.architecture, trained.multimodal)
        write_peft(folder, weights, sites, served, base, dtype, adapters, revision)
    else:
        write_native(folder, weights, dtype)
    (folder / "recipe.yaml").write_text(render_recipe(recipe_without_destinations(recipe)), encoding="utf-8")
    write_manifest(folder, _manifest(trained, index, format))


def _manifest(trained: TrainedGenerator, index: int, format: Any) -> BundleManifest:
    origin = trained.origin_of(index)
    recipe = origin.recipe
    return BundleManifest(
        format=format,
        task=trained.tasks[index],
        backbone=BundleBackbone(
            name=trained.backbone["name"],
            revision=recipe.backbone.revision,
            digest=trained.backbone["digest"],
            dtype=recipe.backbone.dtype,
            quantization=recipe.backbone.quantization,
            model_type=trained.backbone["model_type"],
            multimodal=trained.backbone.get("multimodal"),
        ),
        adapters=tuple(_with_names(adapter, trained.site_map) for adapter in recipe.adaptation.adapters),
        sites=tuple(trained.site_map.to_json()),
        max_source_tokens=recipe.data.max_source_tokens,
        too_long=recipe.data.too_long,
        run=recipe.name,
        step=origin.step,
        produced_by=f"hyperscale {__version__}",
        files={},
    )


def _with_names(adapter: AdapterSettings, site_map: SiteMap) -> AdapterSettings:
    """Return settings that list the projections `all` stands for on this backbone."""
    if ALL not in getattr(adapter, "targets", ()):
        return adapter
    named: AdapterSettings = adapter.model_copy(update={"targets": site_map.targets_of(adapter.kind)})
    return named
