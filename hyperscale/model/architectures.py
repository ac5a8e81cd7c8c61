"""The table of model families: one row each, in `families/`. No file outside that folder names a module."""

from hyperscale.config.plugins import Registry
from hyperscale.errors import BackboneError, nearest
from hyperscale.model.families import gemma, llama, mixture, olmo, phi, t5
from hyperscale.model.families.multimodal import multimodal_of
from hyperscale.model.families.table import Architecture, Stack

__all__ = ["ARCHITECTURES", "Architecture", "Stack", "architecture_of", "register_family"]

_PACKAGED = (*llama.ROWS, *gemma.ROWS, *olmo.ROWS, *phi.ROWS, *mixture.ROWS, *t5.ROWS)
ARCHITECTURES: Registry[Architecture] = Registry(
    "backbone family", "hyperscale.families", {row.model_type: row for row in _PACKAGED}
)


def register_family(row: Architecture) -> None:
    """Add a family of backbones, for every model whose config.json has the row's `model_type`.

    `dataclasses.replace(architecture_of("llama"), …)` is enough for a family that names its layers as LLaMA does.

    Raises:
        PluginError: the `model_type` is taken.
    """
    ARCHITECTURES.register(row.model_type, row)


def architecture_of(model_type: str) -> Architecture:
    """Return the row of a family.

    Raises:
        BackboneError: there is no such row.
        PluginError: there is no such row, and a plug-in that might add it cannot be loaded.
    """
    row = ARCHITECTURES.find(model_type)
    if row is None and multimodal_of(model_type):
        raise BackboneError(
            f"'{model_type}' models are multimodal, and only their text model can be adapted: name the checkpoint as "
            "backbone.name of a recipe, which loads it alone, or hand over the text model"
        )
    if row is None:
        raise BackboneError(
            f"backbones of type '{model_type}' are not supported; supported: {', '.join(ARCHITECTURES)}."
            f"{nearest(model_type, ARCHITECTURES)} A new family is one row: see hyperscale.register_family"
        )
    return row
