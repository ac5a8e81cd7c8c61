"""What each command does, from parsed arguments to an exit code. A vendor is imported by the command that needs it."""

import argparse
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from hyperscale.config.loading import dump_recipe, find_recipe, load_recipe, packaged_recipes
from hyperscale.config.sizes import parse_size
from hyperscale.errors import ConfigError, DataError
from hyperscale.logger import get_logger
from hyperscale.terminal.formats import counted, duration

if TYPE_CHECKING:
    from hyperscale.compare.schedule import RunRecipe
    from hyperscale.config.run import Recipe
    from hyperscale.run.context import RunResult

_logger = get_logger(__name__)


def train(options: argparse.Namespace) -> int:
    """Train a recipe, evaluate it and export its bundles."""
    return _launch(load_recipe(options.recipe, options.overrides), options)


def adapt(options: argparse.Namespace) -> int:
    """Teach a trained generator new tasks, and say which known ones are nearest to them."""
    from hyperscale.run.adapt import adapted_recipe, nearest_tasks
    from hyperscale.run.context import read_result

    share, overrides = options.old_share, options.overrides
    recipe = adapted_recipe(options.checkpoint, options.task, options.train, share, overrides)
    code = _launch(recipe, options)  # from which torchrun's workers do not return
    checkpoint = read_result(recipe.output).checkpoint
    for name, near in nearest_tasks(checkpoint, len(options.task)).items():
        print(f"nearest to {name}: " + ", ".join(f"{other} {cosine:+.2f}" for other, cosine in near))
    return code


def _launch(recipe: "Recipe", options: argparse.Namespace) -> int:
    from hyperscale.launch import torchrun
    from hyperscale.run.outcome import show

    if torchrun.is_worker():
        result = torchrun.train_as_worker(recipe, options.resume)
        if result is not None:
            show(result)
        torchrun.leave()
    if options.launcher == "local":
        from hyperscale.launch.local import require_one_worker, train_in_process

        require_one_worker(recipe)
        _check(recipe, quiet=True)
        show(train_in_process(recipe, options.resume))
        return 0
    _check(recipe, quiet=options.launcher == "torchrun")
    if options.launcher == "torchrun":
        return torchrun.spawn_workers(recipe, options.arguments)
    from hyperscale.launch.ray_train import train_on_ray

    show(train_on_ray(recipe, options.resume))
    return 0


def _check(recipe: "Recipe", quiet: bool) -> None:
    """Check before any worker starts; workers that log to this terminal will say themselves what they read."""
    from hyperscale.logger import get_logger
    from hyperscale.run.preflight import check_recipe

    if quiet:
        with _quiet("hyperscale.data"):
            check_recipe(recipe, lambda _: None)
    else:
        check_recipe(recipe, get_logger(__name__).info)


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def submit(options: argparse.Namespace) -> int:
    """Send a recipe to a Ray cluster as a job."""
    from hyperscale.launch.ray_job import submit_job

    load_recipe(options.recipe, options.overrides)
    recipe, folder = options.recipe, options.working_dir
    if recipe not in packaged_recipes():
        path = find_recipe(recipe)
        folder = (folder or path.parent).absolute()
        if not path.is_relative_to(folder):
            raise ConfigError(f"recipe {path} is not inside --working-dir {folder}, so the cluster would not get it")
        recipe = str(path.relative_to(folder))
    resume = ["--resume"] if options.resume else []
    return submit_job(options.address, [recipe, *options.overrides, *resume], folder, follow=not options.no_follow)


def evaluate(options: argparse.Namespace) -> int:
    """Score a checkpoint's tasks again."""
    from hyperscale.run.evaluate import evaluate_checkpoint
    from hyperscale.run.outcome import print_scores

    print_scores(evaluate_checkpoint(options.checkpoint, options.split))
    return 0


def compare(options: argparse.Namespace) -> int:
    """Train what a comparison still lacks, and write its table."""
    from hyperscale.compare.schedule import check_comparison, count_finished, only_methods, run_comparison
    from hyperscale.compare.table import publish
    from hyperscale.config.comparison import load_comparison

    if options.jobs < 1:
        raise ConfigError(f"--jobs {options.jobs}: at least one run must go on at a time")
    if options.jobs > 1 and options.launcher != "local":
        raise ConfigError(f"--jobs {options.jobs} starts processes of one worker each; add --launcher local")
    comparison = load_comparison(options.comparison)
    if options.only:
        comparison = only_methods(comparison, options.only)
    if options.dry_run:
        runs, finished = check_comparison(comparison), count_finished(comparison)
        print(f"valid: {counted(len(comparison.methods), 'method')}, {counted(runs, 'run')} in {comparison.output}")
        print(f"finished: {finished}, with records in {comparison.records}")
        return 0
    run = _recipe_runner(options.launcher) if options.jobs == 1 else _in_children(Path(comparison.output) / "logs")
    outcome = run_comparison(comparison, run, options.jobs)
    if options.only:
        print(f"trained: {', '.join(comparison.methods)}; the same command without --only writes the table")
        return 0
    print(publish(outcome), end="")
    return 0


def _recipe_runner(launcher: str) -> "RunRecipe":
    """Return what trains one recipe after another, each going on with what lies in its run folder."""
    from hyperscale.run.context import read_result

    if launcher == "local":
        from hyperscale.launch.local import train_in_process

        return lambda recipe, _file: train_in_process(recipe, resume=True)
    if launcher == "torchrun":
        from hyperscale.launch.torchrun import spawn_workers

        def run_torchrun(recipe: "Recipe", file: Path) -> "RunResult":
            spawn_workers(recipe, ["train", str(file), "--resume"])
            return read_result(recipe.output)

        return run_torchrun
    from hyperscale.launch.ray_train import train_on_ray

    return lambda recipe, _file: train_on_ray(recipe, resume=True)


def _in_children(logs: Path) -> "RunRecipe":
    """Return what trains recipes at one time, each in a process of its own with its own log."""
    from hyperscale.launch.local import require_one_worker, train_in_child

    def run(recipe: "Recipe", file: Path) -> "RunResult":
        require_one_worker(recipe)
        result = train_in_child(recipe, file, logs / f"{recipe.name}.log")
        _logger.info("finished %s in %s", recipe.name, duration(result.seconds))
        return result

    return run


def predict(options: argparse.Namespace) -> int:
    """Answer a file's rows with exported bundles."""
    from hyperscale.serving.load import load_bundles
    from hyperscale.serving.predict import predict_file

    if options.batch_size < 1:
        raise ConfigError(f"--batch-size {options.batch_size}: at least one row must run at once")
    _check_files(options.input, options.output)
    bundles = load_bundles(options.bundles, options.backbone, options.dtype)
    rows = predict_file(bundles, options.input, options.output, options.batch_size)
    print(f"{rows} rows answered in {options.output}")
    return 0


def _check_files(source: Path, target: Path) -> None:
    """Find now what would otherwise be found after the backbone is loaded, or after every row is answered."""
    if not source.is_file():
        raise DataError(f"--input {source}: no such file")
    if target.is_dir():
        raise DataError(f"--output {target} is a folder; name a JSONL file")
    if not target.absolute().parent.is_dir():
        raise DataError(f"--output {target}: the folder {target.absolute().parent} does not exist; make it first")
    if not os.access(target.absolute().parent, os.W_OK):
        raise DataError(f"--output {target}: the folder {target.absolute().parent} is not writable; choose another")


def export(options: argparse.Namespace) -> int:
    """Write bundles of a checkpoint."""
    from hyperscale.checkpoint.store import find_checkpoint, load_checkpoint
    from hyperscale.export.exporter import export_bundles, restore_generator

    path = find_checkpoint(options.checkpoint)
    trained = restore_generator(load_checkpoint(path, only=("generator",)))
    output, only = options.output or _bundles_of(path), options.task
    if options.describe:
        from hyperscale.serving.describe import with_described_tasks

        trained = with_described_tasks(trained, options.describe)
        only = [*only, *(task.name for task in trained.tasks[-len(options.describe) :])]
    for name, folder in export_bundles(trained, output, only, options.format).items():
        print(f"{name}\t{folder}")
    return 0


def _bundles_of(checkpoint: str) -> Path:
    """Return bundles/ in the run folder around a checkpoint, wherever that folder has been moved."""
    from hyperscale.checkpoint.layout import CHECKPOINTS, open_place

    place = open_place(checkpoint)
    if not place.is_local or place.parent.name != CHECKPOINTS:
        raise ConfigError(f"{checkpoint} is not in a run folder on this machine: say with --output where bundles go")
    return Path(place.parent.parent.path) / "bundles"


def tasks(options: argparse.Namespace) -> int:
    """List tasks, or show one."""
    from hyperscale.data.tasks import list_tasks, load_task
    from hyperscale.terminal.task_listing import details, table

    if options.task is not None:
        lines = details(load_task(options.task, options.folder))
    else:
        columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        lines = table(list_tasks(options.folder), columns)
    with _quiet("hyperscale.data"):
        for line in lines:
            print(line)
    return 0


def validate(options: argparse.Namespace) -> int:
    """Check a recipe, its backbone and its data."""
    recipe = load_recipe(options.recipe, options.overrides)
    if options.show:
        import yaml

        print(yaml.safe_dump(dump_recipe(recipe), sort_keys=False, allow_unicode=True), end="")
        return 0
    from hyperscale.run.preflight import check_recipe

    found = check_recipe(recipe, lambda _: None)
    width = max(map(len, found.rows))
    for task, (train, validation) in found.rows.items():
        print(f"{task:<{width}}  {train:>7,} training rows  {validation:>6,} validation rows")
    share = 100 * found.trained_parameters / found.backbone_parameters
    print(
        f"valid: {counted(len(found.rows), 'task')}, {counted(found.sites, 'site')}; trains "
        f"{found.trained_parameters:,} parameters ({share:.2f} % of the frozen {found.backbone_parameters:,})"
    )
    return 0


def plan(options: argparse.Namespace) -> int:
    """Say what a run needs; 1 where it does not fit."""
    recipe = load_recipe(options.recipe, options.overrides)
    for name in ("gpus", "nodes", "bandwidth", "rate"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            raise ConfigError(f"--{name} {value}: must be more than 0")
    try:
        memory = parse_size(options.gpu_memory) if options.gpu_memory else None
    except ValueError as error:
        raise ConfigError(f"--gpu-memory: {error}") from error
    from hyperscale.run.plan import PlanOptions, plan_recipe, render_json, render_text

    plan = plan_recipe(recipe, PlanOptions(options.gpus, options.nodes, memory, options.bandwidth, options.rate))
    print(render_json(plan) if options.json else render_text(plan, recipe))
    return 0 if plan.fits is not False else 1


def schema(_options: argparse.Namespace) -> int:
    """Print the JSON schema of a recipe."""
    from hyperscale.config.run import Recipe

    print(json.dumps(Recipe.model_json_schema(), indent=2))
    return 0


def doctor(_options: argparse.Namespace) -> int:
    """Say what this machine has and lacks."""
    from hyperscale.launch.doctor import examine

    return examine()


def track(options: argparse.Namespace) -> int:
    """Send a run's records to MLflow."""
    from hyperscale.tracking.sync import sync_run

    print(sync_run(options.folder, options.uri))
    return 0
