"""The command line: commands and their options, which `commands` carries out; `hyperscale --help` loads no vendor."""

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from hyperscale import commands
from hyperscale.config.loading import packaged_recipes
from hyperscale.errors import HyperscaleError, RunStopped, nearest
from hyperscale.logger import set_up_logging
from hyperscale.version import __version__

Command = Callable[[argparse.Namespace], int]

_OVERRIDES = "a setting of the recipe by its path, the value as YAML: training.steps=500 data.tasks=[news,plural]"
_EXAMPLES = """\
start with:
  hyperscale train demo           the embedded default: a real model, real tasks
  hyperscale validate RECIPE      check a recipe, without training
  hyperscale COMMAND --help       the options of one command
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. A user's error is a message on standard error, without a traceback."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = _parse(words)
    debug = "debug" in options
    set_up_logging("DEBUG" if debug else None)
    command: Command = options.command
    try:
        return command(options)
    except RunStopped as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except HyperscaleError as error:
        if debug:
            raise
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt as error:
        print("stopped; committed checkpoints are kept: continue a run with --resume", file=sys.stderr)
        return getattr(error, "exit_code", 130)
    except BrokenPipeError:  # `hyperscale tasks | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parse(words: list[str]) -> argparse.Namespace:
    """Read the arguments; `key=value` overrides may stand on either side of options, which argparse alone rejects."""
    parser, verbs = _parsers()
    if not words:
        parser.print_help(sys.stderr)
        raise SystemExit(2)
    if not words[0].startswith("-") and words[0] not in verbs:
        parser.error(f"no command '{words[0]}'.{nearest(words[0], verbs)} There are: {', '.join(verbs)}")
    options, rest = parser.parse_known_args(words)
    strangers = [word for word in rest if word.startswith("-") or "=" not in word or "overrides" not in options]
    if strangers:
        verb = verbs[options.verb]
        known = re.findall(r"--[a-z-]+", verb.format_help())
        verb.error(f"unknown: {' '.join(strangers)}.{nearest(strangers[0].partition('=')[0], known)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    options.arguments = words
    return options


def _parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--debug",
        action="store_true",
        default=argparse.SUPPRESS,  # the command's default would otherwise undo a --debug before it
        help="show tracebacks and everything that is logged",
    )
    parser = argparse.ArgumentParser(
        prog="hyperscale",
        description="Adapt one frozen large model to many tasks at once.",
        epilog=_EXAMPLES,
        parents=[common],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-V", "--version", action="version", version=f"hyperscale {__version__}")
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    added: dict[str, argparse.ArgumentParser] = {}

    def verb(name: str, command: Command, help: str) -> argparse.ArgumentParser:
        sentence = f"{help[0].upper()}{help[1:]}."
        added[name] = verbs.add_parser(name, help=help, description=sentence, parents=[common])
        added[name].set_defaults(command=command, verb=name)
        return added[name]

    train = verb("train", commands.train, "train a recipe, evaluate it, export a bundle per task")
    _add_recipe(train)
    _add_launcher(train)
    _add_resume(train)

    adapt = verb("adapt", commands.adapt, "train an existing generator on new tasks")
    _add_checkpoint(adapt)
    _add_overrides(adapt)
    adapt.add_argument("--task", action="append", required=True, help="a new task's name or file; may be repeated")
    adapt.add_argument(
        "--train",
        choices=("new_tasks", "everything"),
        default="new_tasks",
        help="train only the new tasks, which leaves known ones unchanged (default), or the whole generator",
    )
    adapt.add_argument(
        "--old-share",
        type=float,
        default=0.0,
        help="share of samples for the known tasks, with --train everything",
    )
    _add_launcher(adapt)
    _add_resume(adapt)

    submit = verb("submit", commands.submit, "run a recipe as a Ray job on a cluster and follow its log")
    _add_recipe(submit)
    submit.add_argument("--address", required=True, help="the cluster's dashboard: http://HEAD:8265")
    submit.add_argument("--working-dir", type=Path, help="folder to upload (default: a recipe file's own folder)")
    _add_resume(submit)
    submit.add_argument("--no-follow", action="store_true", help="return once the job is submitted")

    evaluate = verb("evaluate", commands.evaluate, "score a checkpoint's tasks again, in one process")
    _add_checkpoint(evaluate)
    _add_overrides(evaluate)
    evaluate.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto: a GPU if the run used one and this machine has one, else the CPU (default)",
    )
    evaluate.add_argument(
        "--split",
        choices=("validation", "test"),
        default="validation",
        help="rows to score; tasks without test rows are left out of test (default: validation)",
    )

    compare = verb("compare", commands.compare, "train methods and seeds with equal budgets, write one table")
    compare.add_argument("comparison", type=Path, help="a YAML file: recipe, methods, learning rates, seeds")
    _add_launcher(compare)
    compare.add_argument("--dry-run", action="store_true", help="only check every recipe and count the runs")
    compare.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="METHOD",
        help="train only this method and write no table, to divide the work among machines; may be repeated",
    )
    compare.add_argument(
        "--jobs",
        type=int,
        default=1,
        help="runs to train at once, with --launcher local; they share this machine's CPUs or GPU (default: 1)",
    )

    predict = verb("predict", commands.predict, "answer the rows of a file with exported bundles")
    predict.add_argument(
        "bundles", nargs="+", type=Path, metavar="BUNDLE", help="bundle folders; rows of several tasks may be mixed"
    )
    predict.add_argument("--input", required=True, type=Path, help="JSONL, CSV or Parquet with the prompt's columns")
    predict.add_argument("--output", required=True, type=Path, help="JSONL to write: the rows with 'prediction' added")
    predict.add_argument("--backbone", help="the backbone's folder, if it has moved since training")
    predict.add_argument(
        "--dtype", choices=("bfloat16", "float32"), help="precision of the backbone (default: as trained)"
    )
    predict.add_argument("--batch-size", type=int, default=16, help="rows at once (default: 16)")

    export = verb("export", commands.export, "write one bundle per task of a checkpoint")
    _add_checkpoint(export)
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

    tasks = verb("tasks", commands.tasks, "list the tasks that a recipe can name, or show one")
    tasks.add_argument("task", nargs="?", help="a task's name or file: describe it and show one example")
    tasks.add_argument(
        "--folder", action="append", default=[], help="also look in this folder of task files; may be repeated"
    )

    models = verb("models", commands.models, "list the families of backbones, and what each supports")
    form = models.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print everything as JSON")
    form.add_argument("--markdown", action="store_true", help="print the table as this project's documents have it")

    validate = verb("validate", commands.validate, "check a recipe, its backbone and its data")
    _add_recipe(validate)
    validate.add_argument("--show", action="store_true", help="print the resolved recipe, and nothing else")

    plan = verb("plan", commands.plan, "estimate the memory and time that a run needs")
    _add_recipe(plan)
    plan.add_argument("--gpus", type=int, help="number of GPUs, one rank each (default: the recipe's cluster section)")
    plan.add_argument("--nodes", type=int, default=1, help="machines that share them evenly (default: 1)")
    plan.add_argument("--gpu-memory", help="memory of one GPU, or of one rank on CPUs: 80GiB (default: this machine's)")
    plan.add_argument("--bandwidth", type=float, help="GB/s that one rank receives from the others")
    plan.add_argument("--rate", type=float, help="TFLOP/s that one rank sustains")
    plan.add_argument("--json", action="store_true", help="print everything as JSON")

    verb("schema", commands.schema, "print the JSON schema of a recipe")
    verb("doctor", commands.doctor, "list what this machine has and what is missing")

    stop = verb("stop", commands.stop, "let a running training save its current step and end")
    stop.add_argument("folder", help="the run folder")
    stop.add_argument("--no-wait", action="store_true", help="return once the run is asked to stop")

    track = verb("track", commands.track, "send the records that a run's trackers lack")
    track.add_argument("folder", help="the run folder")
    track.add_argument("--to", metavar="NAME", help="one tracker (default: those that the recipe enables)")
    track.add_argument("--uri", help="the tracker's server or database (default: the recipe's)")

    completion = verb("completion", commands.completion, "print the completion script of a shell")
    completion.add_argument(
        "shell", choices=("bash", "zsh", "fish", "tcsh"), help="the shell that will read the script"
    )
    completion.set_defaults(parser=parser, parsers=added)
    return parser, added


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help=f"a YAML file, or a packaged recipe: {', '.join(packaged_recipes())}")
    _add_overrides(parser)


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="a checkpoint, or a run folder for its newest one")


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=_OVERRIDES)


def _add_launcher(parser: argparse.ArgumentParser) -> None:
    launchers = ("ray", "torchrun", "local")
    parser.add_argument("--launcher", choices=launchers, default="ray", help="who starts the workers (default: ray)")


def _add_resume(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--resume", action="store_true", help="continue from the newest whole checkpoint")


if __name__ == "__main__":
    sys.exit(main())
