"""Start a run: check the recipe, start its workers, return the result; for the command line and the Python API."""

from typing import Literal

from hyperscale.config.loading import with_tracking_secrets
from hyperscale.config.run import Recipe
from hyperscale.launch import torchrun
from hyperscale.launch.local import require_one_worker, train_in_process
from hyperscale.logger import get_logger, quiet
from hyperscale.run.context import RunResult
from hyperscale.run.preflight import check_recipe

_logger = get_logger(__name__)

Launcher = Literal["ray", "torchrun", "local"]
"""Ray Train workers on a cluster, torchrun workers on this machine, or one worker in this process."""


def start(recipe: Recipe, launcher: Launcher = "ray", resume: bool = False) -> RunResult:
    """Check a recipe, train it, evaluate it and export its bundles.

    In a worker that torchrun has started, this runs the worker's part and `launcher` is ignored: every worker must
    call it. The result is the same on every rank.

    Args:
        recipe: the resolved recipe. One from a run folder has no secrets; its trackers' come from the environment.
        launcher: who starts the workers.
        resume: continue from the newest whole checkpoint in the run folder, which may also hold none.

    Raises:
        ConfigError: the recipe cannot be run, or asks for more workers than the launcher starts.
        RunFolderError: the run folder is busy or not writable, or it holds an earlier run and `resume` is False.
        HyperscaleError: any other error that stops the run. Its checkpoints stay.
    """
    recipe = with_tracking_secrets(recipe)
    if torchrun.is_worker():
        return torchrun.train_as_worker(recipe, resume)
    if launcher == "local":
        require_one_worker(recipe.cluster)
    _check(recipe, launcher)
    return run_workers(recipe, launcher, resume)


def run_workers(recipe: Recipe, launcher: Launcher, resume: bool) -> RunResult:
    """Do what `start` does, without its checks: for a caller that has checked the recipe."""
    if launcher == "local":
        return train_in_process(recipe, resume)
    if launcher == "torchrun":
        return torchrun.train_on_torchrun(recipe, resume)
    from hyperscale.launch.ray_train import train_on_ray  # noqa: PLC0415 (other launchers need no Ray)

    return train_on_ray(recipe, resume)


def _check(recipe: Recipe, launcher: Launcher) -> None:
    """Find the recipe's errors before any worker starts.

    Local and torchrun workers write to this terminal and log what they read, so only Ray's driver logs it here.
    """
    if launcher == "ray":
        check_recipe(recipe, _logger.info)
    else:
        with quiet("hyperscale.data"):
            check_recipe(recipe, lambda _: None)
