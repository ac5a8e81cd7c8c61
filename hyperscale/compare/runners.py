"""How a comparison trains one recipe: with a launcher, or in a child process beside others."""

from collections.abc import Callable
from pathlib import Path

from hyperscale.config.run import Recipe
from hyperscale.launch.local import require_one_worker, train_in_child
from hyperscale.launch.start import Launcher, run_workers
from hyperscale.logger import get_logger
from hyperscale.run.context import RunResult
from hyperscale.terminal.formats import duration

_logger = get_logger(__name__)

RunRecipe = Callable[[Recipe, Path], RunResult]
"""Trains a recipe, which is also stored in a file, and resumes from its run folder."""


def launcher_runner(launcher: Launcher) -> RunRecipe:
    """Return a runner that trains one run at a time."""
    return lambda recipe, _file: run_workers(recipe, launcher, resume=True)


def child_runner(logs: Path) -> RunRecipe:
    """Return a runner for several threads: each run gets a process of its own, which logs to `logs`."""

    def run(recipe: Recipe, file: Path) -> RunResult:
        require_one_worker(recipe.cluster)
        result = train_in_child(recipe, file, logs / f"{recipe.name}.log")
        _logger.info("finished %s in %s", recipe.name, duration(result.seconds))
        return result

    return run
