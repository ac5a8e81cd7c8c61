"""Where things lie in a run folder, and which of its checkpoints count.

    <run folder>/checkpoints/step-000100/{<name>.safetensors …, state.json, manifest.json, recipe.yaml, COMMITTED}

A run folder is a local (or NFS) path or any fsspec URI (`s3://…`, `memory://…`). Imports no torch, so that a driver
can look into a run folder cheaply.
"""

import re

from hyperscale.places import Place

CHECKPOINTS = "checkpoints"
MARKER = "COMMITTED"
STATE = "state.json"
MANIFEST = "manifest.json"
RECIPE = "recipe.yaml"
TENSORS_SUFFIX = ".safetensors"

_NAME = re.compile(r"step-(?P<step>\d{6,})(-(?P<attempt>\d+))?")


def checkpoint_name(step: int, attempt: int = 1) -> str:
    """Return the folder name of a step's checkpoint; a step that is saved again gets the next attempt."""
    return f"step-{step:06d}" if attempt == 1 else f"step-{step:06d}-{attempt}"


def parse_name(name: str) -> tuple[int, int] | None:
    """Return (step, attempt) of a checkpoint's folder name, or None if it is something else."""
    match = _NAME.fullmatch(name)
    return (int(match["step"]), int(match["attempt"] or 1)) if match else None


def whole_checkpoints(run: Place) -> tuple[Place, ...]:
    """Return the committed checkpoints of a run folder, oldest first."""
    dated = [(parse_name(place.name), place) for place in run.child(CHECKPOINTS).children()]
    whole = [(key, place) for key, place in dated if key is not None and place.child(MARKER).exists()]
    return tuple(place for _, place in sorted(whole, key=lambda pair: pair[0]))
