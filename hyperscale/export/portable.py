"""What describes a run, without the paths and accounts of the machine that it ran on."""

import re
from typing import Any, Literal

from hyperscale.assets.backbones import PACKAGED
from hyperscale.config.loading import dump_recipe
from hyperscale.config.run import Recipe
from hyperscale.config.secrets import without_credentials
from hyperscale.config.section import Section
from hyperscale.data.tasks import Task

_PATH = re.compile(r"(/|~|\.\.?/|[A-Za-z][A-Za-z0-9+.-]*://).*", flags=re.DOTALL)


class BackboneName(Section):
    """What a backbone is called where its folder's path means nothing."""

    name: str
    """A hub id, a packaged name, or the last part of a local folder's path."""
    kind: Literal["hub", "packaged", "local"]
    revision: str | None = None
    """Of a hub id, as the recipe names it; null = not pinned."""


def backbone_name(name: str, is_local: bool, revision: str | None) -> BackboneName:
    """Return a backbone's name without paths of this machine."""
    if name in PACKAGED:
        return BackboneName(name=name, kind="packaged")
    if is_local:
        return BackboneName(name=_last_part(name), kind="local")
    return BackboneName(name=name, kind="hub", revision=revision)


def portable_recipe(recipe: Recipe, backbone: str) -> dict[str, Any]:
    """Return a recipe's values without output, tracking and cluster; of any path or URI, the last part is kept.

    `backbone`: its name as `backbone_name` gives it.
    """
    values = dump_recipe(recipe)
    for section in ("tracking", "cluster"):
        del values[section]
    values["output"] = "."
    values["data"]["task_folders"] = []
    values["backbone"]["name"] = backbone
    kept: dict[str, Any] = _without_paths(without_credentials(values))
    return kept


def portable_task(task: Task) -> dict[str, Any]:
    """Return a task's values; of the paths of its rows, the last part is kept."""
    values = task.model_dump(mode="json")
    values["source"] = _without_paths(values["source"])
    return values


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_paths(child) for key, child in value.items()}
    if isinstance(value, list):
        return [_without_paths(child) for child in value]
    return _last_part(value) if isinstance(value, str) and _PATH.fullmatch(value) else value


def _last_part(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2] or "."
