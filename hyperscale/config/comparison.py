"""A comparison: methods, learning rates and seeds over one recipe, each method with the same budget."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PrivateAttr, ValidationError, model_validator

from hyperscale.config.problems import describe
from hyperscale.config.section import Section
from hyperscale.config.yaml_file import read_file
from hyperscale.errors import ConfigError, nearest
from hyperscale.places import is_uri


class Method(Section):
    """What one method changes in the recipe."""

    settings: Mapping[str, Any] = {}
    """Dotted key -> value, such as `adaptation.generator.kind: shared`."""
    single_task: bool = False
    """One run per task, each with its share of the steps, instead of one run for all tasks."""


class Comparison(Section):
    """One YAML file describes one comparison.

    Every method trains at every learning rate with `search_seed`; the rate with the best mean validation score then
    trains once per seed of `seeds`. All runs have the recipe's steps, batch size and tasks.
    """

    _folder: str = PrivateAttr(default="")
    _places: dict[str, str] = PrivateAttr(default_factory=dict)

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    output: str = Field(min_length=1)
    """Folder of the runs and of the table, relative to this file."""
    records: str | None = Field(default=None, min_length=1)
    """Folder of the records of finished runs, relative to this file; by default `records` in `output`. A run that has
    a record there is not trained again, on whichever machine it ran."""
    recipe: str = Field(min_length=1)
    """A packaged recipe, or a file relative to this one."""
    settings: Mapping[str, Any] = {}
    """Dotted key -> value, for all methods."""
    methods: Mapping[str, Method] = Field(min_length=2)
    baseline: str
    """The method that the others are compared with."""
    learning_rates: tuple[Annotated[float, Field(gt=0)], ...] = Field(min_length=1)
    search_seed: int = Field(default=0, ge=0)
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1)
    split: Literal["validation", "test"] = "test"
    """Rows of the final scores. Learning rates are always chosen on the validation rows."""
    resamples: int = Field(default=2000, ge=100)
    """Bootstrap samples of the intervals."""

    def settings_of(self, method: str) -> dict[str, Any]:
        """Return what the file sets for a method: the settings for all methods, then the method's own."""
        return {**self.settings, **self.methods[method].settings}

    def place_of(self, method: str, key: str) -> str:
        """Return `file:line` of a setting of a method, or of the same setting for all methods."""
        return self._places.get(f"methods.{method}.settings.{key}") or self._places.get(f"settings.{key}", "")

    @property
    def folder(self) -> str:
        """The folder of the comparison's file, where relative paths in `settings` begin."""
        return self._folder

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        problems = []
        if self.baseline not in self.methods:
            hint = nearest(self.baseline, self.methods)
            problems.append(f"baseline '{self.baseline}' is not one of the methods {', '.join(self.methods)}.{hint}")
        for name, values in (("learning_rates", self.learning_rates), ("seeds", self.seeds)):
            if len(set(values)) < len(values):
                problems.append(f"{name} lists a value more than once")
        if len(self.learning_rates) > 1 and self.search_seed in self.seeds:
            problems.append(f"search_seed {self.search_seed} is among seeds; the final seeds must be fresh")
        if problems:
            raise ValueError("; ".join(problems))
        return self


def load_comparison(path: Path) -> Comparison:
    """Read a comparison; `output`, `records` and a recipe that is a file become absolute.

    Raises:
        ConfigError: one line per problem, with its line in the file, its path, the value and what is allowed.
    """
    file = read_file(path, "a comparison", ConfigError)
    try:
        comparison = Comparison.model_validate(file.values)
    except ValidationError as error:
        raise ConfigError("\n".join(describe(error, Comparison, file.where))) from error
    folder = path.absolute().parent
    local_recipe = folder / comparison.recipe
    recipe = str(local_recipe) if local_recipe.is_file() else comparison.recipe
    for key, value in (("output", comparison.output), ("records", comparison.records)):
        if value is not None and is_uri(value):
            raise ConfigError(f"{path}: {key}: {value} is a URI; a comparison needs a folder on this machine")
    output = _below(folder, comparison.output)
    records = _below(folder, comparison.records) if comparison.records else str(Path(output) / "records")
    resolved = comparison.model_copy(update={"recipe": recipe, "output": output, "records": records})
    resolved._folder = str(folder)
    sections = {"settings": resolved.settings}
    sections |= {f"methods.{name}.settings": method.settings for name, method in resolved.methods.items()}
    resolved._places = {f"{name}.{key}": file.where(f"{name}.{key}") for name, keys in sections.items() for key in keys}
    return resolved


def _below(folder: Path, path: str) -> str:
    return str((folder / Path(path).expanduser()).resolve())
