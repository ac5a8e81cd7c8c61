"""The command line. Vendors are imported when a command needs them: `hyperscale --help` loads none."""

import argparse
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from hyperscale import __version__
from hyperscale.config.loading import dump_recipe, find_recipe, load_recipe, packaged_recipes
from hyperscale.config.sizes import parse_size
from hyperscale.errors import ConfigError, DataError, HyperscaleError, nearest
from hyperscale.logger import set_up_logging
from hyperscale.tracking.formats import counted

if TYPE_CHECKING:
    from hyperscale.config.run import Recipe
    from hyperscale.launch.compare import RunRecipe
    from hyperscale.launch.context import RunResult

Command = Callable[[argparse.Namespace], int]

_OVERRIDES = "a setting of the recipe by its path, the value as YAML: training.steps=500 data.tasks=[news,plural]"
_EXAMPLES = """\
start with:
  hyperscale train demo           the embedded default: a real model, real tasks
  hyperscale validate RECIPE      what a recipe comes to, without training
  hyperscale COMMAND --help       the options of one command
"""
_RESUME = "continue from the last whole checkpoint in the run folder"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. A user's mistake is a message on standard error, without a traceback."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = _parse(given)
    debug = "debug" in options
    set_up_logging("DEBUG" if debug else None)
    command: Command = options.command
    try:
        return command(options)
    except HyperscaleError as error:
        if debug:
            raise
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped; what is whole stays: continue a run with --resume", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `hyperscale tasks | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parse(given: list[str]) -> argparse.Namespace:
    """Read the arguments; `key=value` overrides may stand on either side of options, which argparse alone refuses."""
    parser, verbs = _parsers()
    if not given:
        parser.print_help(sys.stderr)
        raise SystemExit(2)
    if not given[0].startswith("-") and given[0] not in verbs:
        parser.error(f"no command '{given[0]}'.{nearest(given[0], verbs)} There are: {', '.join(verbs)}")
    options, rest = parser.parse_known_args(given)
    strangers = [word for word in rest if word.startswith("-") or "=" not in word or "overrides" not in options]
    if strangers:
        verb = verbs[options.verb]
        known = re.findall(r"--[a-z-]+", verb.format_help())
        verb.error(f"unknown: {' '.join(strangers)}.{nearest(strangers[0].partition('=')[0], known)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    options.arguments = given
    return options


def _parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--debug",
        action="store_true",
        default=argparse.SUPPRESS,  # or the command's default would undo a --debug in front of it
        help="show tracebacks and everything that is logged",
    )
    parser = argparse.ArgumentParser(
        prog="hyperscale",
        description="Adapt one frozen large model to many tasks at once.",
        epilog=_EXAMPLES,
        parents=[common],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"hyperscale {__version__}")
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    added: dict[str, argparse.ArgumentParser] = {}

    def verb(name: str, command: Command, help: str) -> argparse.ArgumentParser:
        sentence = f"{help[0].upper()}{help[1:]}."
        added[name] = verbs.add_parser(name, help=help, description=sentence, parents=[common])
        added[name].set_defaults(command=command, verb=name)
        return added[name]

    train = verb("train", _train, "train a recipe, evaluate it, export a bundle per task")
    _add_recipe(train)
    train.add_argument(
        "--launcher", choices=("ray", "torchrun", "local"), default="ray", help="who starts the workers (default: ray)"
    )
    train.add_argument("--resume", action="store_true", help=_RESUME)

    adapt = verb("adapt", _adapt, "teach a trained generator new tasks, old ones may stay untouched")
    adapt.add_argument("checkpoint", help="a checkpoint, or a run folder for its newest one")
    adapt.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=_OVERRIDES)
    adapt.add_argument("--task", action="append", required=True, help="a new task's name or file; may be repeated")
    adapt.add_argument(
        "--train",
        choices=("new_tasks", "everything"),
        default="new_tasks",
        help="what learns: only what belongs to the new tasks (default), or the whole generator",
    )
    adapt.add_argument(
        "--old-share", type=float, default=0.0, help="share of the samples for the known tasks, with everything"
    )
    adapt.add_argument(
        "--launcher", choices=("ray", "torchrun", "local"), default="ray", help="who starts the workers (default: ray)"
    )
    adapt.add_argument("--resume", action="store_true", help=_RESUME)

    submit = verb("submit", _submit, "run a recipe as a Ray job on a cluster, follow its log")
    _add_recipe(submit)
    submit.add_argument("--address", required=True, help="the cluster's dashboard: http://HEAD:8265")
    submit.add_argument("--working-dir", type=Path, help="folder to send along (default: a recipe file's own folder)")
    submit.add_argument("--resume", action="store_true", help=_RESUME)
    submit.add_argument("--no-follow", action="store_true", help="return once the job is submitted")

    evaluate = verb("evaluate", _evaluate, "score a checkpoint's tasks again, in one process")
    evaluate.add_argument("checkpoint", help="a checkpoint, or a run folder for its newest one")
    evaluate.add_argument(
        "--split",
        choices=("validation", "test"),
        default="validation",
        help="rows to score; test: of the tasks that have such rows (default: validation)",
    )

    compare = verb("compare", _compare, "train methods and seeds with equal budgets, write one table")
    compare.add_argument("comparison", type=Path, help="a YAML file: recipe, methods, learning rates, seeds")
    compare.add_argument(
        "--launcher", choices=("ray", "torchrun", "local"), default="ray", help="who starts the workers (default: ray)"
    )
    compare.add_argument("--dry-run", action="store_true", help="check every recipe and count the runs, no more")
    compare.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="METHOD",
        help="train this method and write no table, as one of several machines does; may be repeated",
    )

    predict = verb("predict", _predict, "answer the rows of a file with exported bundles")
    predict.add_argument(
        "bundles", nargs="+", type=Path, metavar="BUNDLE", help="bundle folders; rows of several tasks may be mixed"
    )
    predict.add_argument("--input", required=True, type=Path, help="JSONL, CSV or Parquet with the prompt's columns")
    predict.add_argument("--output", required=True, type=Path, help="JSONL to write: the rows with 'prediction' added")
    predict.add_argument("--backbone", help="where the backbone is on this machine, if not where it was")
    predict.add_argument(
        "--dtype", choices=("bfloat16", "float32"), help="precision of the backbone (default: as trained)"
    )
    predict.add_argument("--batch-size", type=int, default=16, help="rows at once (default: 16)")

    export = verb("export", _export, "write one bundle per task of a checkpoint")
    export.add_argument("checkpoint", help="a checkpoint, or a run folder for its newest one")
    export.add_argument("--output", type=Path, help="folder for the bundles (default: bundles/ in the run folder)")
    export.add_argument("--task", action="append", default=[], help="only this task; may be repeated")
    export.add_argument(
        "--describe",
        action="append",
        default=[],
        metavar="TASK",
        help="also a task that was not trained: its weights come from its description (task_encoder.kind=text)",
    )
    export.add_argument("--format", choices=("auto", "peft", "native"), help="default: as the recipe says")

    tasks = verb("tasks", _tasks, "list the tasks that a recipe can name, or show one")
    tasks.add_argument("task", nargs="?", help="a task's name or file: say what it is and show one of its examples")
    tasks.add_argument(
        "--folder", action="append", default=[], help="also look in this folder of task files; may be repeated"
    )

    validate = verb("validate", _validate, "check a recipe, its backbone and its data, no training")
    _add_recipe(validate)
    validate.add_argument("--show", action="store_true", help="print the resolved recipe, and nothing else")

    plan = verb("plan", _plan, "say what memory and time a run needs, no weights read")
    _add_recipe(plan)
    plan.add_argument("--gpus", type=int, help="GPUs in all, one rank each (default: the recipe's cluster section)")
    plan.add_argument("--nodes", type=int, default=1, help="machines that share them evenly (default: 1)")
    plan.add_argument("--gpu-memory", help="memory of one GPU, or of one rank on CPUs: 80GiB (default: this machine's)")
    plan.add_argument("--bandwidth", type=float, help="GB/s that one rank receives from the others")
    plan.add_argument("--rate", type=float, help="TFLOP/s that one rank sustains, measured or hoped for")
    plan.add_argument("--json", action="store_true", help="print everything as JSON")

    verb("schema", _schema, "print the JSON schema of a recipe")
    verb("doctor", _doctor, "say what this machine has and what is missing")

    track = verb("track", _track, "send a run's metrics.jsonl to MLflow, now or again")
    track.add_argument("folder", help="the run folder")
    track.add_argument("--uri", help="MLflow server or database (default: as the recipe says)")
    return parser, added


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help=f"a YAML file, or a packaged recipe: {', '.join(packaged_recipes())}")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=_OVERRIDES)


def _train(options: argparse.Namespace) -> int:
    return _launch(load_recipe(options.recipe, options.overrides), options)


def _adapt(options: argparse.Namespace) -> int:
    from hyperscale.launch.adapt import adapted_recipe, nearest_tasks
    from hyperscale.launch.context import read_result

    share, overrides = options.old_share, options.overrides
    recipe = adapted_recipe(options.checkpoint, options.task, options.train, share, overrides)
    code = _launch(recipe, options)  # from which torchrun's workers do not return
    checkpoint = read_result(recipe.output).checkpoint
    for name, near in nearest_tasks(checkpoint, len(options.task)).items():
        print(f"nearest to {name}: " + ", ".join(f"{other} {cosine:+.2f}" for other, cosine in near))
    return code


def _launch(recipe: "Recipe", options: argparse.Namespace) -> int:
    from hyperscale.launch import torchrun
    from hyperscale.launch.outcome import show

    if torchrun.is_worker():
        result = torchrun.train_as_worker(recipe, options.resume)
        if result is not None:
            show(result)
        torchrun.leave()
    if options.launcher == "local":
        from hyperscale.launch.local import refuse_several_workers, train_in_process

        refuse_several_workers(recipe)
        _check(recipe, is_told_later=True)
        show(train_in_process(recipe, options.resume))
        return 0
    _check(recipe, is_told_later=options.launcher == "torchrun")
    if options.launcher == "torchrun":
        return torchrun.spawn_workers(recipe, options.arguments)
    from hyperscale.launch.ray_train import train_on_ray

    show(train_on_ray(recipe, options.resume))
    return 0


def _check(recipe: "Recipe", is_told_later: bool) -> None:
    """Check before any worker starts; workers that log to this terminal will say themselves what they read."""
    from hyperscale.launch.preflight import check_recipe
    from hyperscale.logger import get_logger

    if is_told_later:
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


def _submit(options: argparse.Namespace) -> int:
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


def _evaluate(options: argparse.Namespace) -> int:
    from hyperscale.launch.evaluate import evaluate_checkpoint
    from hyperscale.launch.outcome import print_scores

    print_scores(evaluate_checkpoint(options.checkpoint, options.split))
    return 0


def _compare(options: argparse.Namespace) -> int:
    from hyperscale.config.comparison import load_comparison
    from hyperscale.launch.compare import check_comparison, only_methods, run_comparison
    from hyperscale.launch.comparison_table import publish

    comparison = load_comparison(options.comparison)
    if options.only:
        comparison = only_methods(comparison, options.only)
    if options.dry_run:
        runs = check_comparison(comparison)
        print(f"valid: {counted(len(comparison.methods), 'method')}, {counted(runs, 'run')} in {comparison.output}")
        return 0
    outcome = run_comparison(comparison, _recipe_runner(options.launcher))
    if options.only:
        print(f"trained: {', '.join(comparison.methods)}; the same command without --only writes the table")
        return 0
    print(publish(outcome), end="")
    return 0


def _recipe_runner(launcher: str) -> "RunRecipe":
    """Return what trains one recipe after another, each going on with what lies in its run folder."""
    from hyperscale.launch.context import read_result

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


def _predict(options: argparse.Namespace) -> int:
    from hyperscale.inference.load import load_bundles
    from hyperscale.inference.predict import predict_file

    if options.batch_size < 1:
        raise ConfigError(f"--batch-size {options.batch_size}: at least one row must run at once")
    _refuse_unusable_files(options.input, options.output)
    bundles = load_bundles(options.bundles, options.backbone, options.dtype)
    rows = predict_file(bundles, options.input, options.output, options.batch_size)
    print(f"{rows} rows answered in {options.output}")
    return 0


def _refuse_unusable_files(source: Path, target: Path) -> None:
    """Find now what would otherwise be found after the backbone is loaded, or after every row is answered."""
    if not source.is_file():
        raise DataError(f"--input {source}: no such file")
    if target.is_dir():
        raise DataError(f"--output {target} is a folder; name a JSONL file")
    if not target.absolute().parent.is_dir():
        raise DataError(f"--output {target}: the folder {target.absolute().parent} does not exist; make it first")
    if not os.access(target.absolute().parent, os.W_OK):
        raise DataError(f"--output {target}: the folder {target.absolute().parent} is not writable; choose another")


def _export(options: argparse.Namespace) -> int:
    from hyperscale.checkpoint.store import find_checkpoint, load_checkpoint
    from hyperscale.export.exporter import export_bundles, restore_generator

    path = find_checkpoint(options.checkpoint)
    trained = restore_generator(load_checkpoint(path, only=("generator",)))
    output, only = options.output or _bundles_of(path), options.task
    if options.describe:
        from hyperscale.inference.describe import with_described_tasks

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


def _tasks(options: argparse.Namespace) -> int:
    from hyperscale.data.listing import details, table
    from hyperscale.data.tasks import list_tasks, load_task

    if options.task is not None:
        lines = details(load_task(options.task, options.folder))
    else:
        columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        lines = table(list_tasks(options.folder), columns)
    with _quiet("hyperscale.data"):
        for line in lines:
            print(line)
    return 0


def _validate(options: argparse.Namespace) -> int:
    recipe = load_recipe(options.recipe, options.overrides)
    if options.show:
        import yaml

        print(yaml.safe_dump(dump_recipe(recipe), sort_keys=False, allow_unicode=True), end="")
        return 0
    from hyperscale.launch.preflight import check_recipe

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


def _plan(options: argparse.Namespace) -> int:
    recipe = load_recipe(options.recipe, options.overrides)
    for name in ("gpus", "nodes", "bandwidth", "rate"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            raise ConfigError(f"--{name} {value}: must be more than 0")
    try:
        memory = parse_size(options.gpu_memory) if options.gpu_memory else None
    except ValueError as error:
        raise ConfigError(f"--gpu-memory: {error}") from error
    from hyperscale.launch.plan import Asked, plan_recipe, render_json, render_text

    plan = plan_recipe(recipe, Asked(options.gpus, options.nodes, memory, options.bandwidth, options.rate))
    print(render_json(plan) if options.json else render_text(plan, recipe))
    return 0 if plan.fits is not False else 1


def _schema(_options: argparse.Namespace) -> int:
    from hyperscale.config.run import Recipe

    print(json.dumps(Recipe.model_json_schema(), indent=2))
    return 0


def _doctor(_options: argparse.Namespace) -> int:
    from hyperscale.launch.doctor import examine

    return examine()


def _track(options: argparse.Namespace) -> int:
    from hyperscale.tracking.sync import sync_run

    print(sync_run(options.folder, options.uri))
    return 0


if __name__ == "__main__":
    sys.exit(main())
