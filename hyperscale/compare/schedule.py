"""`hyperscale compare`: train one recipe with several methods and seeds, with equal budgets.

A comparison can be stopped and continued: a finished run is not repeated, and a stopped run resumes. Each finished run
leaves a record (`compare/record.py`); its folder is not needed after that.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from threading import Event
from typing import Any

from hyperscale.compare.record import RunRecord, changed_setting, read_record, record_run, write_record
from hyperscale.compare.runners import RunRecipe
from hyperscale.config.comparison import Comparison, Method
from hyperscale.config.loading import (
    dump_recipe,
    load_recipe,
    parse_recipe,
    render_recipe,
    shareable_recipe,
    with_tracking_secrets,
)
from hyperscale.config.run import Recipe
from hyperscale.config.yaml_file import read_mapping
from hyperscale.errors import ConfigError, HyperscaleError, RunFolderError, nearest
from hyperscale.logger import get_logger
from hyperscale.run.context import RESULT, RunResult, read_result

_logger = get_logger(__name__)


@dataclass(frozen=True)
class Trial:
    """One method at one learning rate with one seed: a single run, or one run for each task."""

    method: str
    learning_rate: float
    seed: int
    recipes: tuple[Recipe, ...]


@dataclass(frozen=True)
class FinishedTrial:
    """A trial and the records of its runs."""

    trial: Trial
    records: tuple[RunRecord, ...]

    @property
    def validation(self) -> float:
        """Mean of the tasks' last validation scores, in percent."""
        scores = [score for record in self.records for score in record.validation.values()]
        return sum(scores) / len(scores)


_Place = tuple[str, float, int]
"""Method, learning rate and seed of a trial."""
_Finish = Callable[[_Place], FinishedTrial]
_Begin = Callable[[_Place], Future[FinishedTrial]]


@dataclass(frozen=True)
class Outcome:
    """All trials of a comparison."""

    comparison: Comparison
    search: Mapping[str, Sequence[FinishedTrial]]
    """method -> its trials with the search seed; empty if there is only one learning rate."""
    final: Mapping[str, Sequence[FinishedTrial]]
    """method -> its trials at the chosen learning rate, one per seed, in their order."""


def only_methods(comparison: Comparison, names: Sequence[str]) -> Comparison:
    """Return a comparison with only the named methods, for one of several machines that share a folder.

    Raises:
        ConfigError: a name is not a method of the comparison.
    """
    for name in names:
        if name not in comparison.methods:
            hint = nearest(name, comparison.methods)
            raise ConfigError(f"--only {name} is not one of the methods {', '.join(comparison.methods)}.{hint}")
    chosen = {name: method for name, method in comparison.methods.items() if name in names}
    return comparison.model_copy(update={"methods": chosen})


def check_comparison(comparison: Comparison) -> int:
    """Build every recipe without running any, and return the number of runs.

    Raises:
        ConfigError: a setting does not fit the recipe.
    """
    searched = len(comparison.learning_rates) if len(comparison.learning_rates) > 1 else 0
    first = comparison.learning_rates[0]
    return sum(
        len(make_trial(comparison, method, first, comparison.search_seed).recipes) * (searched + len(comparison.seeds))
        for method in comparison.methods
    )


def count_finished(comparison: Comparison) -> int:
    """Return how many of a comparison's runs have a record, without running any.

    Final seeds count once a method's search is complete; before that, no learning rate is chosen.

    Raises:
        HyperscaleError: a record cannot be read, or belongs to different settings.
    """
    rates = comparison.learning_rates
    finished = 0
    for method in comparison.methods:
        chosen = rates[0]
        if len(rates) > 1:
            search = [_kept_part(comparison, (method, rate, comparison.search_seed)) for rate in rates]
            finished += sum(len(part.records) for part in search)
            if any(len(part.records) < len(part.trial.recipes) for part in search):
                continue
            chosen = _best_rate(search)
        finished += sum(len(_kept_part(comparison, (method, chosen, seed)).records) for seed in comparison.seeds)
    return finished


def _kept_part(comparison: Comparison, place: _Place) -> FinishedTrial:
    """Return a trial with the records that it already has."""
    trial = make_trial(comparison, *place)
    records = (_kept_record(comparison, recipe) for recipe in trial.recipes)
    return FinishedTrial(trial, tuple(record for record in records if record is not None))


def run_comparison(comparison: Comparison, run: RunRecipe, jobs: int = 1) -> Outcome:
    """Search each method's learning rate on validation, then train its seeds.

    `jobs`: number of trials at a time; `run` is called from as many threads.

    Raises:
        HyperscaleError: a run failed; finished runs stay and are not repeated.
    """
    total, numbers = check_comparison(comparison), count(1)

    def finish(place: _Place) -> FinishedTrial:
        trial = make_trial(comparison, *place)
        split = comparison.split if trial.seed in comparison.seeds else None
        records = []
        for recipe in trial.recipes:
            _logger.info("run %d of %d: %s", next(numbers), total, recipe.name)
            records.append(_finished_run(comparison, recipe, run, split))
        return FinishedTrial(trial, tuple(records))

    rates = comparison.learning_rates
    searched = rates if len(rates) > 1 else ()
    search: dict[str, list[FinishedTrial]] = {}
    final: dict[str, list[Future[FinishedTrial]]] = {}
    with _beginning(finish, jobs) as begin:
        searching = {
            name: [begin((name, rate, comparison.search_seed)) for rate in searched] for name in comparison.methods
        }
        for name, trials in searching.items():  # a method's seeds do not wait for the search of the others
            search[name] = [trial.result() for trial in trials]
            chosen = _best_rate(search[name]) if searched else rates[0]
            final[name] = [begin((name, chosen, seed)) for seed in comparison.seeds]
        finished = {name: [trial.result() for trial in trials] for name, trials in final.items()}
    return Outcome(comparison, search if searched else {}, finished)


def _best_rate(search: Sequence[FinishedTrial]) -> float:
    return max(search, key=lambda finished: finished.validation).trial.learning_rate


@contextmanager
def _beginning(finish: _Finish, jobs: int) -> Iterator[_Begin]:
    """Yield a function that starts a trial. Up to `jobs` trials run at a time, in order; one job waits for each trial.

    After a failure no further trial starts, and running trials finish. A caller that reads the results in the order of
    their start sees the failure before the cancelled trials.
    """
    if jobs == 1:
        yield lambda place: _done(finish(place))
        return
    failed = Event()

    def unless_failed(place: _Place) -> FinishedTrial:
        if failed.is_set():
            raise CancelledError
        try:
            return finish(place)
        except BaseException:
            failed.set()
            raise

    with ThreadPoolExecutor(jobs) as pool:
        try:
            yield lambda place: pool.submit(unless_failed, place)
        except BaseException:
            failed.set()
            raise


def _done(trial: FinishedTrial) -> Future[FinishedTrial]:
    future: Future[FinishedTrial] = Future()
    future.set_result(trial)
    return future


def make_trial(comparison: Comparison, method: str, learning_rate: float, seed: int) -> Trial:
    """Return the recipes of one trial, with absolute paths and the secrets of their trackers."""
    name = f"{method}_lr{learning_rate:g}_seed{seed}"
    settings: dict[str, Any] = {
        **comparison.settings_of(method),
        "training.optimizer.learning_rate": learning_rate,
        "seed": seed,
        "name": name,
        "output": str(Path(comparison.output) / "runs" / name),
        "training.evaluate_untouched": False,
        "training.evaluate_test": comparison.split == "test" and seed in comparison.seeds,
        "export.enabled": False,
    }
    try:
        recipe = with_tracking_secrets(load_recipe(comparison.recipe, settings, folder=Path(comparison.folder)))
    except ConfigError as error:
        lines = [_with_place(comparison, method, line) for line in str(error).splitlines()]
        raise ConfigError("\n".join(lines)) from error
    return Trial(method, learning_rate, seed, _runs_of(recipe, comparison.methods[method]))


def _with_place(comparison: Comparison, method: str, line: str) -> str:
    """Return a recipe's problem with the method, and with the line of the comparison's file that sets the value."""
    for key, value in comparison.settings_of(method).items():
        override = f"override '{key}={json.dumps(value, ensure_ascii=False)}': "
        place = comparison.place_of(method, key)
        if place and line.startswith(override):
            return f"{place}: method {method}: {line.removeprefix(override)}"
    return f"method {method}, {line}"


def _runs_of(recipe: Recipe, method: Method) -> tuple[Recipe, ...]:
    if not method.single_task:
        return (recipe,)
    tasks = recipe.data.tasks
    steps, left = divmod(recipe.training.steps, len(tasks))
    if left or not steps:
        raise ConfigError(
            f"single_task divides training.steps {recipe.training.steps} among {len(tasks)} tasks, which leaves a "
            f"remainder; use training.steps={max(1, round(recipe.training.steps / len(tasks))) * len(tasks)}"
        )
    recipes = []
    for task in tasks:
        raw = dump_recipe(recipe)
        label = Path(task).stem
        raw |= {"name": f"{recipe.name}_{label}", "output": f"{recipe.output}_{label}"}
        raw["data"]["tasks"] = [task]
        raw["training"]["steps"] = steps
        raw["training"]["optimizer"]["warmup_steps"] = min(recipe.training.optimizer.warmup_steps, steps // 10)
        recipes.append(parse_recipe(raw, f"{recipe.name}, task {label}"))
    return tuple(recipes)


def _finished_run(comparison: Comparison, recipe: Recipe, run: RunRecipe, split: str | None) -> RunRecord:
    """Return the record of a run; train the run first if it has not finished."""
    kept = _kept_record(comparison, recipe)
    if kept is not None:
        return kept
    record = record_run(recipe, _finish_run(recipe, Path(comparison.output), run), split)
    write_record(record, _records_of(comparison), recipe.name)
    return record


def _kept_record(comparison: Comparison, recipe: Recipe) -> RunRecord | None:
    records = _records_of(comparison)
    kept = read_record(records, recipe.name)
    if kept is not None:
        _check_same_settings(
            recipe, {**kept.recipe, "output": recipe.output}, f"{records} contains a record of {recipe.name}"
        )
    return kept


def _records_of(comparison: Comparison) -> Path:
    assert comparison.records, "load_comparison sets it"
    return Path(comparison.records)


def _finish_run(recipe: Recipe, output: Path, run: RunRecipe) -> RunResult:
    folder = Path(recipe.output)
    if (folder / "recipe.yaml").is_file():
        earlier = read_mapping(folder / "recipe.yaml", "a recipe", ConfigError)
        _check_same_settings(recipe, earlier, f"{folder} contains a run")
    if (folder / RESULT).is_file():
        return read_result(recipe.output)
    file = output / "recipes" / f"{recipe.name}.yaml"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(render_recipe(shareable_recipe(recipe)), encoding="utf-8")
    except OSError as error:
        raise RunFolderError(f"output={output} cannot be written: {error.strerror}; choose another folder") from error
    try:
        return run(recipe, file)
    except HyperscaleError as error:
        raise type(error)(
            f"run {recipe.name} failed: {error}\nFinished runs are kept; the same command continues from here"
        ) from error


def _check_same_settings(recipe: Recipe, earlier: Mapping[str, Any], what: str) -> None:
    """Check that an earlier run of the same name has the same settings."""
    changed = changed_setting(parse_recipe(earlier, what), recipe)
    if changed is not None:
        raise RunFolderError(
            f"{what} with different settings ({changed}); choose another folder, or delete it to train that run again"
        )
