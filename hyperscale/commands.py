"""The commands, from parsed arguments to an exit code. Each command imports the vendor libraries that it needs."""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from hyperscale.config.loading import dump_recipe, find_recipe, load_recipe, packaged_recipes
from hyperscale.config.sizes import parse_size
from hyperscale.errors import ConfigError, RunFolderError
from hyperscale.terminal.formats import counted

if TYPE_CHECKING:
    from hyperscale.config.run import Recipe
    from hyperscale.run.context import RunResult

_STOP_POLL_SECONDS = 0.2


def train(options: argparse.Namespace) -> int:
    """Train a recipe, evaluate it and export its bundles."""
    return _train(load_recipe(options.recipe, options.overrides), options, lambda _: None)


def adapt(options: argparse.Namespace) -> int:
    """Teach a trained generator new tasks, and print the known tasks that are most similar."""
    from hyperscale.run.adapt import adapted_recipe, nearest_tasks

    def print_nearest(result: "RunResult") -> None:
        for name, near in nearest_tasks(result.checkpoint, len(options.task)).items():
            print(f"nearest to {name}: " + ", ".join(f"{other} {cosine:+.2f}" for other, cosine in near))

    share, overrides = options.old_share, options.overrides
    recipe = adapted_recipe(options.checkpoint, options.task, options.train, share, overrides)
    return _train(recipe, options, print_nearest)


def _train(recipe: "Recipe", options: argparse.Namespace, print_more: Callable[["RunResult"], None]) -> int:
    from hyperscale.launch import torchrun
    from hyperscale.launch.start import start
    from hyperscale.run.outcome import show

    result = start(recipe, options.launcher, options.resume)
    if torchrun.is_first_process():
        show(result)
        print_more(result)
    if torchrun.is_worker():
        torchrun.leave()
    return 0


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
    """Score the tasks of a checkpoint again."""
    from hyperscale.run.evaluate import evaluate_checkpoint
    from hyperscale.run.outcome import print_scores

    print_scores(evaluate_checkpoint(options.checkpoint, options.split, options.overrides, options.device))
    return 0


def compare(options: argparse.Namespace) -> int:
    """Train the missing runs of a comparison, and write its table."""
    from hyperscale.compare.runners import child_runner, launcher_runner
    from hyperscale.compare.schedule import check_comparison, count_finished, only_methods, run_comparison
    from hyperscale.compare.table import publish
    from hyperscale.config.comparison import load_comparison

    if options.jobs < 1:
        raise ConfigError(f"--jobs {options.jobs}: at least one run must be trained at a time")
    if options.jobs > 1 and options.launcher != "local":
        raise ConfigError(f"--jobs {options.jobs} starts one process with one worker per run; add --launcher local")
    comparison = load_comparison(options.comparison)
    if options.only:
        comparison = only_methods(comparison, options.only)
    if options.dry_run:
        runs, finished = check_comparison(comparison), count_finished(comparison)
        print(f"valid: {counted(len(comparison.methods), 'method')}, {counted(runs, 'run')} in {comparison.output}")
        print(f"finished: {finished}, with records in {comparison.records}")
        return 0
    one_by_one = options.jobs == 1
    run = launcher_runner(options.launcher) if one_by_one else child_runner(Path(comparison.output) / "logs")
    outcome = run_comparison(comparison, run, options.jobs)
    if options.only:
        print(f"trained: {', '.join(comparison.methods)}; the same command without --only writes the table")
        return 0
    print(publish(outcome), end="")
    return 0


def predict(options: argparse.Namespace) -> int:
    """Answer the rows of a file with exported bundles."""
    from hyperscale.places import local_path
    from hyperscale.serving.load import load_bundles
    from hyperscale.serving.predict import check_files, predict_file

    if options.batch_size < 1:
        raise ConfigError(f"--batch-size {options.batch_size}: at least one row must run at once")
    check_files(local_path(options.input), local_path(options.output))
    bundles = load_bundles([local_path(bundle) for bundle in options.bundles], options.backbone, options.dtype)
    rows = predict_file(bundles, options.input, options.output, options.batch_size)
    print(f"{rows} rows answered in {options.output}")
    return 0


def export(options: argparse.Namespace) -> int:
    """Write the bundles of a checkpoint."""
    from hyperscale.export.exporter import export_bundles
    from hyperscale.export.opening import open_generator
    from hyperscale.places import local_path

    output = local_path(options.output) if options.output else _bundles_of(options.checkpoint)
    trained, only = open_generator(options.checkpoint), options.task
    if options.describe:
        from hyperscale.serving.describe import with_described_tasks

        trained = with_described_tasks(trained, options.describe)
        only = [*only, *(task.name for task in trained.tasks[-len(options.describe) :])]
    for name, folder in export_bundles(trained, output, only, options.format).items():
        print(f"{name}\t{folder}")
    return 0


def _bundles_of(source: str) -> Path:
    """Return bundles/ in the run folder of a checkpoint, even if that folder was moved."""
    from hyperscale.checkpoint.layout import CHECKPOINTS
    from hyperscale.checkpoint.store import find_checkpoint
    from hyperscale.export.generator_folder import is_generator_folder
    from hyperscale.places import open_place

    source_place = open_place(source)
    if source_place.is_local and is_generator_folder(source_place.local_path):
        raise ConfigError(f"{source} is a saved generator, not a run folder: set --output to a bundle folder")
    checkpoint = find_checkpoint(source)
    place = open_place(checkpoint)
    if not place.is_local or place.parent.name != CHECKPOINTS:
        raise ConfigError(f"{checkpoint} is not in a run folder on this machine: set --output to a bundle folder")
    return place.parent.parent.local_path / "bundles"


def tasks(options: argparse.Namespace) -> int:
    """List tasks, or show one."""
    from hyperscale.data.tasks import list_tasks, load_task
    from hyperscale.logger import quiet
    from hyperscale.terminal.task_listing import details, table

    if options.task is not None:
        lines = details(load_task(options.task, options.folder))
    else:
        columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        lines = table(list_tasks(options.folder), columns)
    with quiet("hyperscale.data"):
        for line in lines:
            print(line)
    return 0


def models(options: argparse.Namespace) -> int:
    """List the families of backbones, and what each supports."""
    from hyperscale.run.models import list_families, render_json, render_markdown, render_text

    families = list_families()
    if options.json:
        print(render_json(families))
    else:
        print("\n".join((render_markdown if options.markdown else render_text)(families)))
    return 0


def validate(options: argparse.Namespace) -> int:
    """Check a recipe, its backbone and its data."""
    recipe = load_recipe(options.recipe, options.overrides)
    if options.show:
        import yaml

        print(yaml.safe_dump(dump_recipe(recipe), sort_keys=False, allow_unicode=True), end="")
        return 0
    from hyperscale.run.preflight import check_recipe

    sizes = check_recipe(recipe, lambda _: None)
    width = max(map(len, sizes.rows))
    for task, (train, validation) in sizes.rows.items():
        print(f"{task:<{width}}  {train:>7,} training rows  {validation:>6,} validation rows")
    share = 100 * sizes.trained_parameters / sizes.backbone_parameters
    print(
        f"valid: {counted(len(sizes.rows), 'task')}, {counted(sizes.sites, 'site')}; trains "
        f"{sizes.trained_parameters:,} parameters ({share:.2f} % of the frozen {sizes.backbone_parameters:,})"
    )
    return 0


def plan(options: argparse.Namespace) -> int:
    """Print what a run needs; exit code 1 if it does not fit."""
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
    """Print what this machine has and lacks."""
    from hyperscale.launch.doctor import examine

    return examine()


def stop(options: argparse.Namespace) -> int:
    """Ask a running training to save its current step and to end, and wait until it has."""
    from hyperscale.checkpoint.stop_file import is_running, request_stop

    if not is_running(options.folder):
        raise RunFolderError(f"{options.folder}: no run writes there. Give the folder of a run that is training")
    request_stop(options.folder, "hyperscale stop")
    while not options.no_wait and is_running(options.folder):
        time.sleep(_STOP_POLL_SECONDS)
    done = "is asked to stop after its current step" if options.no_wait else "has stopped"
    print(f"the run in {options.folder} {done}; continue it with --resume")
    return 0


def track(options: argparse.Namespace) -> int:
    """Send the missing records of a run to the trackers."""
    from hyperscale.tracking import trackers

    print("\n".join(trackers.track(options.folder, options.to, options.uri)))
    return 0


def completion(options: argparse.Namespace) -> int:
    """Print the script by which a shell completes the commands, their options and file names."""
    import shtab

    parsers: Mapping[str, argparse.ArgumentParser] = options.parsers
    for action in (action for parser in parsers.values() for action in parser._actions):
        if action.type is Path or action.dest in ("recipe", "checkpoint", "folder", "task"):
            action.complete = shtab.FILE  # type: ignore[attr-defined]
        if action.dest == "recipe":
            names = " ".join(packaged_recipes())
            function = f'_hyperscale_recipe_files() {{ compgen -f -W "{names}" -- "$1"; }}'
            own = {"bash": "_hyperscale_recipe_files", "preamble": {"bash": function}}
            action.complete = shtab.FILE | own  # type: ignore[attr-defined]
    print(shtab.complete(options.parser, shell=options.shell))
    return 0
