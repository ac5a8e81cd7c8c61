"""One frozen large model, many tasks at once."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hyperscale.version import __version__ as __version__

if TYPE_CHECKING:
    from hyperscale.api.adapt import MultiTaskModel as MultiTaskModel
    from hyperscale.api.adapt import adapt as adapt
    from hyperscale.config.adaptation import LoraSettings as LoraSettings

_PUBLIC = {
    "MultiTaskModel": "hyperscale.api.adapt",
    "adapt": "hyperscale.api.adapt",
    "LoraSettings": "hyperscale.config.adaptation",
}
"""Public name -> the module that defines it, imported at first use: torch is slow to load."""


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'hyperscale' has no attribute '{name}'")
    return getattr(import_module(_PUBLIC[name]), name)
