"""One frozen large model, many tasks at once."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hyperscale.version import __version__ as __version__

if TYPE_CHECKING:
    from hyperscale.api.adapt import MultiTaskModel as MultiTaskModel
    from hyperscale.api.adapt import adapt as adapt
    from hyperscale.api.bundles import Bundles as Bundles
    from hyperscale.api.bundles import load_bundles as load_bundles
    from hyperscale.api.generator import Generator as Generator
    from hyperscale.api.recipes import load_recipe as load_recipe
    from hyperscale.api.training import TrainResult as TrainResult
    from hyperscale.api.training import train as train
    from hyperscale.config.adaptation import AdapterSection as AdapterSection
    from hyperscale.config.adaptation import GeneratorSection as GeneratorSection
    from hyperscale.config.adaptation import LoraSettings as LoraSettings
    from hyperscale.config.extensions import register_adapter_kind as register_adapter_kind
    from hyperscale.config.extensions import register_generator as register_generator
    from hyperscale.data.metric_table import register_metric as register_metric
    from hyperscale.errors import HyperscaleError as HyperscaleError
    from hyperscale.model.architectures import register_family as register_family

_PUBLIC = {
    "Generator": "hyperscale.api.generator",
    "HyperscaleError": "hyperscale.errors",
    "TrainResult": "hyperscale.api.training",
    "load_recipe": "hyperscale.api.recipes",
    "train": "hyperscale.api.training",
    "MultiTaskModel": "hyperscale.api.adapt",
    "adapt": "hyperscale.api.adapt",
    "Bundles": "hyperscale.api.bundles",
    "load_bundles": "hyperscale.api.bundles",
    "AdapterSection": "hyperscale.config.adaptation",
    "GeneratorSection": "hyperscale.config.adaptation",
    "LoraSettings": "hyperscale.config.adaptation",
    "register_adapter_kind": "hyperscale.config.extensions",
    "register_generator": "hyperscale.config.extensions",
    "register_family": "hyperscale.model.architectures",
    "register_metric": "hyperscale.data.metric_table",
}
"""Public name -> the module that defines it, imported at first use: torch is slow to load."""


__all__ = [
    "AdapterSection",
    "Bundles",
    "Generator",
    "GeneratorSection",
    "HyperscaleError",
    "LoraSettings",
    "MultiTaskModel",
    "TrainResult",
    "adapt",
    "load_bundles",
    "load_recipe",
    "register_adapter_kind",
    "register_family",
    "register_generator",
    "register_metric",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'hyperscale' has no attribute '{name}'")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
