"""Bundles on an unsharded backbone, ready to answer.

Imports no DeepSpeed, Ray or tracker: a serving machine has none of them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hyperscale.config.backbone import BackboneSettings
from hyperscale.errors import BundleError, nearest
from hyperscale.export.bundle import BundleManifest, read_manifest
from hyperscale.export.native_format import read_native
from hyperscale.export.peft_format import read_peft
from hyperscale.export.server_names import served_sites
from hyperscale.logger import get_logger
from hyperscale.model.adapted import AdaptedModel
from hyperscale.model.backbone import BackboneFolder, load_dense, open_backbone
from hyperscale.model.build import Blueprint
from hyperscale.model.families.multimodal import multimodal_of
from hyperscale.model.sites import SiteMap
from hyperscale.model.weights import Weights

_logger = get_logger(__name__)


class StoredWeights(nn.Module):
    """Takes a generator's place: weights [1, S, …] of each bundle, generated when the bundles were exported."""

    def __init__(self, bundles: Sequence[Weights]) -> None:
        super().__init__()
        self.bundles = list(bundles)

    def forward(self, task_index: Tensor) -> Weights:
        """Return the weights [K, S, …] of bundles [K], by their position."""
        chosen = [self.bundles[index] for index in task_index.tolist()]
        return {
            group: {name: torch.cat([bundle[group][name] for bundle in chosen]).to(task_index.device) for name in named}
            for group, named in chosen[0].items()
        }


class LoadedBundles:
    """One backbone and several tasks on it; a task's index is its bundle's position."""

    def __init__(
        self, model: AdaptedModel, weights: StoredWeights, tokenizer: PreTrainedTokenizerBase, device: torch.device
    ) -> None:
        """`model` has `weights` in its generator's place."""
        self.model = model
        self.tokenizer = tokenizer
        self.device = device
        self._weights = weights
        self._manifests: list[BundleManifest] = []

    @property
    def manifests(self) -> tuple[BundleManifest, ...]:
        return tuple(self._manifests)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the loaded tasks, in the order of their indices."""
        return tuple(manifest.task.name for manifest in self._manifests)

    def index_of(self, task: str) -> int:
        """Return a task's index.

        Raises:
            BundleError: no bundle of that task is loaded.
        """
        if task not in self.tasks:
            known = ", ".join(self.tasks) or "none"
            raise BundleError(f"no bundle of task '{task}' is loaded.{nearest(task, self.tasks)} Loaded: {known}")
        return self.tasks.index(task)

    def append(self, folder: Path, manifest: BundleManifest) -> None:
        """Read one more bundle, which must fit the backbone and the sites.

        Raises:
            BundleError: its task is loaded already.
        """
        if manifest.task.name in self.tasks:
            raise BundleError(
                f"bundle {folder}: a bundle of task '{manifest.task.name}' is loaded already; remove it first"
            )
        self._weights.bundles.append(_read(folder, manifest, self.model.site_map))
        self._manifests.append(manifest)

    def remove(self, task: str) -> None:
        """Forget a task; the indices of those after it become one less.

        Raises:
            BundleError: no bundle of that task is loaded.
        """
        index = self.index_of(task)
        del self._weights.bundles[index], self._manifests[index]


def load_bundles(folders: Sequence[Path], backbone: str | None = None, dtype: str | None = None) -> LoadedBundles:
    """Load bundles that share a backbone and a site map; their tasks can then be mixed in one batch.

    Args:
        backbone: another name or folder for the same backbone (it may lie elsewhere on this machine).
        dtype: `bfloat16` or `float32`; None = as trained.

    Raises:
        BundleError: none, a damaged bundle, two of one task, or bundles of different backbones or site maps.
        BackboneError: the backbone cannot be found, or is another one.
    """
    if not folders:
        raise BundleError("give at least one bundle folder: the first one says which backbone to load")
    manifests = [read_manifest(folder) for folder in folders]
    first = manifests[0]
    for folder, manifest in zip(folders, manifests, strict=True):
        check_alike(folder, manifest, first)
    backbone_folder, settings = _open_backbone(folders[0], first, backbone, dtype)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    _logger.info("loading %s (%s) on %s", settings.name, settings.dtype, device)
    module = load_dense(backbone_folder, settings).eval().to(device)
    blueprint = Blueprint.of_sites(first.sites, first.backbone.model_type, first.adapters)
    weights = StoredWeights([])
    model = blueprint.adapt(module, weights)
    loaded = LoadedBundles(model, weights, AutoTokenizer.from_pretrained(backbone_folder.path), device)
    for folder, manifest in zip(folders, manifests, strict=True):
        loaded.append(folder, manifest)
    return loaded


def check_alike(folder: Path, manifest: BundleManifest, first: BundleManifest) -> None:
    """Raise `BundleError` unless a bundle can be loaded beside the first one."""
    for what, one, other in (
        ("backbone", manifest.backbone.digest, first.backbone.digest),
        ("sites", manifest.sites, first.sites),
        ("adapters", manifest.adapters, first.adapters),
    ):
        if one != other:
            raise BundleError(
                f"bundle {folder} has another {what} than the bundle of task '{first.task.name}': load them separately"
            )


def _open_backbone(
    folder: Path, manifest: BundleManifest, backbone: str | None, dtype: str | None
) -> tuple[BackboneFolder, BackboneSettings]:
    settings = BackboneSettings.model_validate(
        {
            "name": backbone or manifest.backbone.name,
            "revision": None if backbone else manifest.backbone.revision,
            "dtype": dtype or manifest.backbone.dtype,
            "quantization": manifest.backbone.quantization,
        }
    )
    backbone_folder = open_backbone(settings)
    if backbone_folder.digest() != manifest.backbone.digest:
        raise BundleError(
            f"bundle {folder} was made for the backbone '{manifest.backbone.name}' "
            f"(digest {manifest.backbone.digest[:12]}…), but {backbone_folder.path} is another model "
            f"(digest {backbone_folder.digest()[:12]}…); give the right one with --backbone"
        )
    return backbone_folder, settings


def _read(folder: Path, manifest: BundleManifest, site_map: SiteMap) -> Mapping[str, Mapping[str, Tensor]]:
    if manifest.format == "peft":
        served = served_sites(site_map, multimodal_of(manifest.backbone.multimodal))
        stored = read_peft(folder, served, manifest.adapters)
    else:
        stored = read_native(folder, site_map)
    return {group: {name: tensor.float() for name, tensor in named.items()} for group, named in stored.items()}
