"""YAML -> Recipe: packaged names, `key=value` overrides, and every problem reported at once."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from hyperscale.config.problems import describe
from hyperscale.config.run import Recipe
from hyperscale.config.secrets import without_credentials
from hyperscale.config.yaml_file import read_file
from hyperscale.errors import ConfigError, nearest

_PATHS: Mapping[str, Callable[[Path], bool]] = {
    "backbone.name": Path.is_dir,
    "engine.ds_config": lambda path: path.suffix == ".json",
    "data.tasks": lambda path: path.suffix in (".yaml", ".yml"),
    "data.task_folders": lambda _path: True,
    "data.cache_folder": lambda _path: True,
}
"""The settings that may name files, each with a test that tells a file from a packaged name or a hub id."""


def packaged_recipes() -> dict[str, Path]:
    """Return the shipped recipes by name."""
    folder = Path(str(resources.files("hyperscale") / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_recipe(name_or_path: str) -> Path:
    """Return the file of a recipe: a path, or the name of a packaged one.

    Raises:
        ConfigError: neither exists.
    """
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return path.absolute()
    packaged = packaged_recipes()
    if name_or_path in packaged:
        return packaged[name_or_path]
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        raise ConfigError(f"recipe file '{name_or_path}' does not exist (looked in {path.absolute().parent})")
    raise ConfigError(
        f"no recipe '{name_or_path}': not a file, and not one of {', '.join(packaged)}."
        + nearest(name_or_path, packaged)
    )


_DESTINATIONS = ("output", "tracking")
"""The sections that name where a run writes. They do not change what it computes."""


def load_recipe(
    name_or_path: str, overrides: Sequence[str] | Mapping[str, Any] = (), folder: Path | None = None
) -> Recipe:
    """Read, override and check a recipe; every path in the result is absolute.

    Paths inside a recipe (backbone folder, task files, DeepSpeed JSON) are relative to the recipe's own folder, those
    of overrides to the working directory. `output` too is relative to the working directory.

    Args:
        name_or_path: a YAML file or the name of a packaged recipe.
        overrides: `dotted.key=value`, the value read as YAML, or a mapping of dotted keys to values. Those that choose
            a kind take effect first, in any order.
        folder: where paths in overrides begin; by default the working directory.

    Raises:
        ConfigError: one line per problem, each with the file and its line or the override that it comes from, the
            dotted path, the value and what is allowed.
    """
    path = find_recipe(name_or_path)
    file = read_file(path, "a recipe", ConfigError)
    texts = _apply_overrides(file.values, overrides)
    raw = _with_absolute_paths(file.values, path.parent, texts, folder or Path.cwd())
    return parse_recipe(raw, file.where, texts)


def change_recipe(recipe: Recipe, changes: Mapping[str, Any], overrides: Sequence[str], where: str) -> Recipe:
    """Return a resolved recipe with sections or keys replaced, then overridden; paths in `overrides` begin here.

    Raises:
        ConfigError: as `load_recipe`.
    """
    raw = dump_recipe(recipe)
    for key, value in changes.items():
        _set_value(raw, key, value, f"{key}={value}")
    _apply_overrides(raw, overrides)
    return parse_recipe(_with_absolute_paths(raw, Path.cwd(), overrides, Path.cwd()), where, overrides)


def parse_recipe(raw: Mapping[str, Any], where: str | Callable[[str], str], overrides: Sequence[str] = ()) -> Recipe:
    """Check plain values as a recipe.

    Messages begin with the override that set the value, else with `where`: a name, or the name of each dotted path.
    """
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        locate = where if callable(where) else lambda _path: where
        lines = describe(error, Recipe, lambda path: _origin(path, locate(path), overrides))
        raise ConfigError("\n".join(lines)) from error


def _origin(path: str, where: str, overrides: Sequence[str]) -> str:
    """Return the source of the value at `path`: its last override, or `where` and the overrides of its parts."""
    place = path.replace("[", ".").replace("]", "")
    of_parts = []
    for override in reversed(overrides):
        key = override.partition("=")[0]
        if f"{place}.".startswith(f"{key}."):
            return f"override '{override}'"
        if place and key.startswith(f"{place}."):
            of_parts.append(f"'{override}'")
    return f"{where} with {', '.join(reversed(of_parts))}" if of_parts else where


def dump_recipe(recipe: Recipe) -> dict[str, Any]:
    """Return the resolved recipe as plain JSON values; `parse_recipe` reads it back."""
    return recipe.model_dump(mode="json")


def shareable_recipe(recipe: Recipe) -> dict[str, Any]:
    """Return the resolved recipe as plain JSON values without secrets, for run folders and checkpoints."""
    shareable: dict[str, Any] = without_credentials(dump_recipe(recipe))
    return shareable


def recipe_without_destinations(recipe: Recipe) -> dict[str, Any]:
    """Return the resolved recipe as plain values without secrets and destinations, for bundles and records."""
    return {key: value for key, value in shareable_recipe(recipe).items() if key not in _DESTINATIONS}


def render_recipe(values: Mapping[str, Any]) -> str:
    """Return a recipe's plain values as YAML."""
    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)


def with_tracking_secrets(recipe: Recipe) -> Recipe:
    """Return a recipe that was read from a run folder with the secrets of its trackers, from the environment.

    Raises:
        ConfigError: a secret is missing; the message names its variable.
    """
    return recipe.model_copy(update={"tracking": recipe.tracking.with_secrets()})


def _apply_overrides(raw: dict[str, Any], overrides: Sequence[str] | Mapping[str, Any]) -> list[str]:
    """Change `raw` and return each override as text for messages, in the order given."""
    if isinstance(overrides, Mapping):
        parsed = [(key, value, f"{key}={json.dumps(value, ensure_ascii=False)}") for key, value in overrides.items()]
    else:
        parsed = [(*_read_override(override), override) for override in overrides]
    for key, value, text in sorted(parsed, key=lambda one: not one[0].endswith(".kind")):
        _set_value(raw, key, value, text)
    return [text for _, _, text in parsed]


def _read_override(override: str) -> tuple[str, Any]:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override '{override}' is not of the form dotted.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override '{override}': the value is not valid YAML") from error
    if isinstance(value, str):
        value = _number(value)
    return key, value


def _set_value(raw: dict[str, Any], key: str, value: Any, override: str) -> None:
    node: Any = raw
    *parents, last = key.split(".")
    for depth, part in enumerate(parents):
        node = _descend(node, part, ".".join(parents[: depth + 1]), override)
    if isinstance(node, list):
        node[_position(node, last, key, override)] = value
        return
    if last == "kind" and parents[:1] == ["adaptation"] and node.get("kind", value) != value:
        node.clear()  # a new kind: the settings of the old kind would be unknown keys
    node[last] = value


def _descend(node: Any, part: str, path: str, override: str) -> Any:
    if isinstance(node, list):
        child = node[_position(node, part, path, override)]
    else:
        child = node.setdefault(part, {})
        if child is None:
            child = node[part] = {}
    if not isinstance(child, dict | list):
        raise ConfigError(f"override '{override}': '{path}' is {child!r}, not a section")
    return child


def _position(items: list[Any], part: str, path: str, override: str) -> int:
    if not part.isdigit() or int(part) >= len(items):
        places = f"a position from 0 to {len(items) - 1}" if items else "no position: the list is empty"
        raise ConfigError(f"override '{override}': '{path}' must end in {places}")
    return int(part)


def _number(text: str) -> Any:
    """YAML 1.1 reads `5e-4` as text; users mean a number."""
    try:
        return float(text) if any(digit.isdigit() for digit in text) else text
    except ValueError:
        return text


def _with_absolute_paths(
    raw: dict[str, Any], folder: Path, overrides: Sequence[str], overrides_folder: Path
) -> dict[str, Any]:
    overridden = [override.partition("=")[0] for override in overrides]

    def absolute(value: Any, key: str, is_path: Callable[[Path], bool]) -> Any:
        if not isinstance(value, str) or "://" in value:
            return value
        from_here = any(key == other or key.startswith(f"{other}.") for other in overridden)
        path = Path(os.path.expandvars(value)).expanduser()
        candidate = os.path.normpath((overrides_folder if from_here else folder) / path)
        named_as_path = value.startswith((".", "~", "/", "$"))
        return candidate if named_as_path or is_path(Path(candidate)) else value

    if isinstance(raw.get("output"), str) and "://" not in raw["output"]:
        raw["output"] = os.path.abspath(Path(os.path.expandvars(raw["output"])).expanduser())
    for key, is_path in _PATHS.items():
        section, name = key.split(".")
        values = raw.get(section)
        if not isinstance(values, dict):
            continue
        if isinstance(values.get(name), list):
            values[name] = [absolute(item, f"{key}.{place}", is_path) for place, item in enumerate(values[name])]
        elif name in values:
            values[name] = absolute(values[name], key, is_path)
    return raw
