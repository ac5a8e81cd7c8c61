"""The report at the end of a run: the scores against the baselines, the paths, and commands to try next."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hyperscale.terminal.formats import duration, gain, score
from hyperscale.tracking.metrics import main_score, mean_score
from hyperscale.training.callbacks import EvaluationRecord


@dataclass(frozen=True)
class RunSummary:
    """Everything that the report shows. Parts that are None or empty are left out."""

    name: str
    step: int
    seconds: float
    trained: EvaluationRecord | None = None
    untouched: EvaluationRecord | None = None
    majority: EvaluationRecord | None = None
    places: Mapping[str, str] = field(default_factory=dict)
    """Name -> path: `run folder`, `checkpoint`, `bundles`, `Tracker run` …"""
    next_commands: Sequence[tuple[str, str]] = ()
    """Commands to try, each with what it does."""


def final_table(
    trained: EvaluationRecord, untouched: EvaluationRecord | None = None, majority: EvaluationRecord | None = None
) -> Table:
    """Return the tasks' main scores beside the baselines; the gain is over the untouched backbone."""
    table = Table(box=box.SIMPLE_HEAD, show_footer=True, show_edge=False, pad_edge=False, collapse_padding=True)
    columns = [("majority", majority), ("untouched", untouched), ("trained", trained)]
    shown = [(title, record) for title, record in columns if record is not None]
    # On a narrow terminal long names are folded, and numbers keep their width.
    table.add_column("task", footer="mean", overflow="fold")
    table.add_column("metric", style="dim", overflow="fold")
    table.add_column("samples", justify="right", style="dim", no_wrap=True)
    for title, record in shown:
        style = "bold" if title == "trained" else None
        table.add_column(title, justify="right", style=style, no_wrap=True, footer=score(_mean(record, trained)))
    if untouched is not None:
        table.add_column("gain", justify="right", no_wrap=True, footer=_gain_cell(*_means(trained, untouched)))
    for task, scores in trained.scores.items():
        cells: list[str | Text] = [score(_main(record, task)) for _, record in shown]
        if untouched is not None:
            cells.append(_gain_cell(_main(trained, task), _main(untouched, task)))
        table.add_row(task, next(iter(scores), "–"), f"{trained.samples.get(task, 0):,}", *cells)
    return table


def all_scores_table(record: EvaluationRecord) -> Table:
    """Return every metric of every task, and the mean of all these numbers: 11 for the 8 tasks of GLUE."""
    numbers = [value for scores in record.scores.values() for value in scores.values()]
    table = Table(box=box.SIMPLE_HEAD, show_footer=True, show_edge=False, pad_edge=False, collapse_padding=True)
    table.add_column("task", footer=f"mean of {len(numbers)}", overflow="fold")
    table.add_column("metric", style="dim", overflow="fold")
    table.add_column(record.stage, justify="right", no_wrap=True, footer=score(sum(numbers) / len(numbers)))
    for task, scores in record.scores.items():
        for metric, value in scores.items():
            table.add_row(task, metric, score(value))
    return table


def print_report(summary: RunSummary, console: Console) -> None:
    """Print the report. Paths and commands stay on one line, so that they can be copied."""
    console.print()
    console.print(Text(f"{summary.name}: {summary.step:,} steps in {duration(summary.seconds)}", style="bold"))
    if summary.trained is not None:
        stage = f"{summary.trained.stage} scores in percent"
        note = "; gain over the untouched backbone" if summary.untouched is not None else ""
        console.print(Text(stage + note, style="dim"))
        console.print(final_table(summary.trained, summary.untouched, summary.majority))
        console.print()
    width = max(map(len, summary.places), default=0)
    for what, where in summary.places.items():
        console.print(Text(f"{what:<{width}}  ", style="dim").append(where, style="default"), soft_wrap=True)
    if summary.next_commands:
        console.print(Text("\nnext", style="bold"))
    for command, purpose in summary.next_commands:
        console.print(Text(f"  # {purpose}", style="dim"), soft_wrap=True)
        console.print(Text(f"  {command}"), soft_wrap=True)


def _main(record: EvaluationRecord, task: str) -> float | None:
    return main_score(record.scores.get(task, {}))


def _mean(record: EvaluationRecord, over: EvaluationRecord) -> float | None:
    """Return the mean over the tasks of another record, or None if one of them has no score here."""
    scores = {task: record.scores[task] for task in over.scores if record.scores.get(task)}
    return mean_score(scores) if len(scores) == len(over.scores) else None


def _means(trained: EvaluationRecord, untouched: EvaluationRecord) -> tuple[float | None, float | None]:
    return _mean(trained, trained), _mean(untouched, trained)


def _gain_cell(after: float | None, before: float | None) -> Text:
    difference = None if after is None or before is None else after - before
    return Text(gain(difference), style="red" if difference is not None and difference < 0 else "green")
