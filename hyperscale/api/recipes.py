"""Recipes from Python."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from hyperscale.config import loading
from hyperscale.config.run import Recipe


def load_recipe(name_or_path: str | Path, overrides: Mapping[str, Any] | Sequence[str] = ()) -> Recipe:
    """Read a recipe, change some of its settings, and check all of it.

    Args:
        name_or_path: a YAML file, or the name of a packaged recipe such as `demo`.
        overrides: dotted keys with Python values, or the command line's `key=value` texts. Paths in them begin at the
            working directory.

    Returns:
        The resolved recipe. It cannot be changed; load it again with other overrides.

    Raises:
        ConfigError: one line for each problem: where it is, what is wrong, and what is allowed.

    Example:
        >>> recipe = hs.load_recipe("demo", {"training.steps": 300, "data.tasks": ["tweets", "plural"]})
        >>> recipe.training.steps
        300
    """
    texts = (
        [f"{key}={_as_yaml(value)}" for key, value in overrides.items()]
        if isinstance(overrides, Mapping)
        else overrides
    )
    return loading.load_recipe(str(name_or_path), texts)


def _as_yaml(value: Any) -> str:
    """Return a value as one line of YAML."""
    plain = str(value) if isinstance(value, Path) else value
    line = yaml.safe_dump([plain], default_flow_style=True, allow_unicode=True, width=float("inf"))
    return line.strip()[1:-1]
