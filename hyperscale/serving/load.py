"""Bundles on an unsharded backbone, ready to answer.

Imports no DeepSpeed, Ray or MLflow: a serving machine has none of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hyperscale.config.backbone import BackboneSettings
from hyperscale.errors import BundleError
from hyperscale.export.bundle import BundleManifest, read_manifest
from hyperscale.export.native_format import read_native
from hyperscale.export.peft_format import read_peft
from hyperscale.logger import get_logger
from hyperscale.model.adapted import AdaptedModel
from hyperscale.model.backbone import load_dense, open_backbone
from hyperscale.model.build import Blueprint
from hyperscale.model.sites import SiteMap
from hyperscale.model.weights import Weights

_logger = get_logger(__name__)


class StoredWeights(nn.Module):
    """Stands in a generator's place: weights [K, S, …] that were generated when the bundles were exported."""

    def __init__(self, tasks: Sequence[Weights]) -> None:
        super().__init__()
        self._weights: dict[str, dict[str, Tensor]] = {
            group: {name: torch.cat([task[group][name] for task in tasks]) for name in named}
            for group, named in tasks[0].items()
        }

    def forward(self, task_index: Tensor) -> Weights:
        """Return the weights of bundles [K], by their position."""
        return {
            group: {
                name: tensor.index_select(0, task_index.cpu()).to(task_index.device) for name, tensor in named.items()
            }
            for group, named in self._weights.items()
        }


@dataclass(frozen=True)
class LoadedBundles:
    """One backbone and several tasks on it; a task's index is its bundle's position."""

    model: AdaptedModel
    manifests: tuple[BundleManifest, ...]
    tokenizer: PreTrainedTokenizerBase
    device: torch.device


def load_bundles(folders: Sequence[Path], backbone: str | None = None, dtype: str | None = None) -> LoadedBundles:
    """Load bundles that share a backbone and a site map; their tasks can then be mixed in one batch.

    Args:
        backbone: another name or folder for the same backbone (it may lie elsewhere on this machine).
        dtype: `bfloat16` or `float32`; None = as trained.

    Raises:
        BundleError: a damaged bundle, or bundles of different backbones or site maps.
        BackboneError: the backbone cannot be found, or is another one.
    """
    manifests = tuple(read_manifest(folder) for folder in folders)
    first = manifests[0]
    for folder, manifest in zip(folders, manifests, strict=True):
        if (manifest.backbone.digest, manifest.sites, manifest.adapters) != (
            first.backbone.digest,
            first.sites,
            first.adapters,
        ):
            raise BundleError(f"bundle {folder} has another backbone or other sites than {folders[0]}; load them apart")
    settings = BackboneSettings.model_validate(
        {
            "name": backbone or first.backbone.name,
            "dtype": dtype or first.backbone.dtype,
            "quantization": first.backbone.quantization,
        }
    )
    found = open_backbone(settings)
    if found.digest() != first.backbone.digest:
        raise BundleError(
            f"bundle {folders[0]} was made for the backbone '{first.backbone.name}' "
            f"(digest {first.backbone.digest[:12]}…), but {found.path} is another model "
            f"(digest {found.digest()[:12]}…); give the right one with --backbone"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    _logger.info("loading %s (%s) on %s", settings.name, settings.dtype, device)
    module = load_dense(found, settings).eval().to(device)
    blueprint = Blueprint.of_sites(first.sites, first.backbone.model_type, first.adapters)
    weights = StoredWeights(
        [_read(folder, manifest, blueprint.site_map) for folder, manifest in zip(folders, manifests, strict=True)]
    )
    return LoadedBundles(blueprint.adapt(module, weights), manifests, AutoTokenizer.from_pretrained(found.path), device)


def _read(folder: Path, manifest: BundleManifest, site_map: SiteMap) -> Mapping[str, Mapping[str, Tensor]]:
    read = read_peft if manifest.format == "peft" else read_native
    return {
        group: {name: tensor.float() for name, tensor in named.items()}
        for group, named in read(folder, site_map).items()
    }
