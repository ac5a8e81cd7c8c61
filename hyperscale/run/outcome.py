"""The summary of a finished run in the terminal."""

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from hyperscale.data import templates
from hyperscale.errors import BundleError
from hyperscale.export.bundle import read_manifest
from hyperscale.places import open_place
from hyperscale.run.context import RunResult
from hyperscale.terminal.report import RunSummary, all_scores_table, final_table, print_report
from hyperscale.training.callbacks import EvaluationRecord
from hyperscale.training.evaluation import MAJORITY, UNTOUCHED, VALIDATION


def show(result: RunResult) -> None:
    """Print the scores next to the baselines, the places of all outputs, and the next commands."""
    records = [EvaluationRecord(**record) for record in result.evaluations]
    places = {"run folder": _nearby(result.folder), "checkpoint": _nearby(result.checkpoint)}
    if result.bundles:
        places["bundles"] = _nearby(str(open_place(next(iter(result.bundles.values()))).parent))
    for name, place in result.trackers.items():
        places[f"{place.get('title', name)} run"] = _nearby_within(place.get("where", ""))
    share = 100 * result.trained_parameters / result.total_parameters
    places["trained"] = f"{result.trained_parameters:,} of {result.total_parameters:,} parameters ({share:.2f} %)"
    summary = RunSummary(
        name=result.name,
        step=result.steps,
        seconds=result.seconds,
        trained=_last(records, VALIDATION),
        untouched=_last(records, UNTOUCHED),
        majority=_last(records, MAJORITY),
        places=places,
        next_commands=_next_commands(result),
    )
    print_report(summary, Console())


def print_scores(records: Sequence[EvaluationRecord]) -> None:
    """Print the main scores of the last record next to the majority class; then all scores if a task has several."""
    console, scored = Console(), records[-1]
    console.print(final_table(scored, majority=_last(records, MAJORITY)))
    if any(len(scores) > 1 for scores in scored.scores.values()):
        console.print()
        console.print(all_scores_table(scored))


def _last(records: Sequence[EvaluationRecord], stage: str) -> EvaluationRecord | None:
    return next((record for record in reversed(records) if record.stage == stage), None)


def _next_commands(result: RunResult) -> list[tuple[str, str]]:
    commands = []
    activate = Path(sys.executable).with_name("activate")
    if activate.exists() and shutil.which("hyperscale") != str(activate.with_name("hyperscale")):
        commands.append((f"source {shlex.quote(_nearby(str(activate)))}", "run once in this shell"))
    if result.bundles:
        bundle = next(iter(result.bundles.values()))
        if not open_place(bundle).is_local:
            command = f"hyperscale export {shlex.quote(result.folder)} --output bundles"
            commands.append((command, "write the bundles to this machine"))
            bundle = f"bundles/{open_place(bundle).name}"
        command = f"hyperscale predict {shlex.quote(_nearby(bundle))} --input rows.jsonl --output answers.jsonl"
        commands.append((command, f"answer your own rows{_columns(bundle)}"))
    for name, place in result.trackers.items():
        if place.get("command"):
            commands.append((_nearby_within(place["command"]), f"see the run in {place.get('title', name)}"))
    commands.append((f"hyperscale evaluate {shlex.quote(_nearby(result.folder))}", "score the newest checkpoint again"))
    return commands


def _columns(bundle: str) -> str:
    """Return a clause that names the columns of a bundle's rows, or "" if this process cannot read the bundle."""
    try:
        columns = templates.parse(read_manifest(Path(bundle)).task.input).columns
    except (BundleError, OSError):
        return ""
    return f", which need {', '.join(columns)}"


def _nearby(path: str) -> str:
    """Return a path relative to the working directory if it is below it; it is shorter to copy."""
    return os.path.relpath(path) if path.startswith(f"{Path.cwd()}{os.sep}") else path


def _nearby_within(text: str) -> str:
    """Return a text in which paths below the working directory are relative to it."""
    return text.replace(f"{Path.cwd()}{os.sep}", "")
