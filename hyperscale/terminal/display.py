"""The driver's terminal: a live picture of the run, or plain lines in a job's log."""

import logging
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from hyperscale.config.tracking import ProgressSettings
from hyperscale.terminal.formats import count, duration, score
from hyperscale.terminal.progress import Progress, advance
from hyperscale.tracking.metrics import mean_score

_STAGES = {"majority": "majority class", "untouched": "untouched backbone", "validation": "validation", "test": "test"}
_LINE_TASKS = 8
_ROWS_AROUND = 8


class ProgressDisplay:
    """Shows what `ProgressSender` sends. Its `with` block restores the terminal at the end."""

    def __init__(self, settings: ProgressSettings, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, highlight=False)
        self._settings = settings
        self._progress = Progress()
        self._live: Live | None = None
        self._last_step = -1
        self._last_time = float("-inf")

    def __enter__(self) -> Self:
        if self._settings.enabled and self._console.is_terminal:
            self._live = Live(get_renderable=self._frame, console=self._console, refresh_per_second=5)
            original = sys.stderr
            self._live.start()
            self._move_logs(original, sys.stderr)
        return self

    def __exit__(self, *error: object) -> None:
        if self._live:
            redirected = sys.stderr
            self._live.stop()
            self._move_logs(redirected, sys.stderr)
            self._live = None

    def consume(self, event: Mapping[str, Any]) -> None:
        """Take one event and show it."""
        before, self._progress = self._progress, advance(self._progress, event)
        if self._settings.enabled and self._live is None:
            line = self._line(event, before)
            if line:
                self._console.print(f"{time.strftime('%H:%M:%S')} {line}", markup=False, soft_wrap=True)

    def _frame(self) -> RenderableType:
        return live_frame(self._progress, self._console.width, max(3, self._console.height - _ROWS_AROUND))

    def _move_logs(self, old: Any, new: Any) -> None:
        # A log line written past the live picture would break it, so our handlers write through it.
        for handler in logging.getLogger("hyperscale").handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is old:
                handler.setStream(new)

    def _line(self, event: Mapping[str, Any], before: Progress) -> str:
        """Return an event's line; empty for most steps and counts, which are too many."""
        now = self._progress
        match event["event"]:
            case "start":
                return start_line(now)
            case "phase" if now.phase != before.phase or self._is_time():
                self._last_time = time.monotonic()
                return _phase(now)
            case "step" if self._is_step_due(now):
                self._last_step, self._last_time = now.step, time.monotonic()
                return step_line(now)
            case "evaluation":
                return evaluation_line(now, event["stage"])
            case "checkpoint" if now.checkpoint_step != before.checkpoint_step:  # scored ones come twice
                return f"checkpoint of step {now.checkpoint_step}"
            case "end" if event["status"] != "stopped":  # the command's last line says it
                return f"{now.outcome} at step {now.step} after {duration(event['seconds'])}"
        return ""

    def _is_step_due(self, now: Progress) -> bool:
        every = self._settings.every_steps
        is_time = self._is_time() if every is None else now.step // every > self._last_step // every
        return is_time or self._last_step < 0 or now.step == now.total_steps

    def _is_time(self) -> bool:
        return time.monotonic() - self._last_time >= self._settings.interval_seconds


def start_line(progress: Progress) -> str:
    """Return one line that describes the run."""
    share = 100 * progress.trained_parameters / max(progress.total_parameters, 1)
    start = f" from step {progress.start_step}" if progress.start_step else ""
    return (
        f"{progress.name}: {_plural(len(progress.tasks), 'task')}, {_plural(progress.total_steps, 'step')}{start} on "
        f"{_plural(progress.world_size, 'worker')}; trains {count(progress.trained_parameters)} "
        f"of {count(progress.total_parameters)} parameters ({share:.2g} %)"
    )


def step_line(progress: Progress) -> str:
    """Return one line about the state of training."""
    percent = 100 * progress.step / max(progress.total_steps, 1)
    known = progress.task_losses
    losses = _listed({task: f"{known[task]:.3f}" for task in progress.tasks if task in known})
    left = f"  {duration(progress.seconds_left)} left" if progress.seconds_left else ""
    return (
        f"step {progress.step}/{progress.total_steps} ({percent:.0f}%)  loss {progress.loss:.3f}  "
        f"{count(progress.tokens_per_second)} tokens/s{left}{losses}"
    )


def evaluation_line(progress: Progress, stage: str) -> str:
    """Return one line with the newest scores of a stage."""
    scores = progress.scores[stage]
    step = "" if stage in ("majority", "untouched") else f" at step {progress.evaluated_step}"
    mean = mean_score({task: {"main": value} for task, value in scores.items() if value is not None})
    return f"{_STAGES.get(stage, stage)}{step}: mean {score(mean)}" + _listed(
        {task: score(value) for task, value in scores.items()}
    )


def live_frame(progress: Progress, width: int, num_rows: int) -> RenderableType:
    """Return the live picture for a terminal of `width` columns, with at most `num_rows` tasks."""
    head = Table.grid(padding=(0, 1))
    total = max(progress.total_steps, 1)
    head.add_row(
        Text(progress.name or "hyperscale", style="bold"),
        ProgressBar(total=total, completed=progress.step, width=max(10, min(40, width - 50))),
        Text(f"{progress.step}/{progress.total_steps}", style="cyan"),
        Text(f"{100 * progress.step / total:.0f}%"),
        Text(f"{duration(progress.seconds_left)} left" if progress.seconds_left else "", style="dim"),
    )
    parts: list[RenderableType] = [head]
    if progress.loss is not None:
        parts.append(_numbers(progress))
    if progress.tasks and (progress.task_losses or progress.scores):
        parts.append(_task_table(progress, num_rows))
    parts.append(_status(progress))
    return Group(*parts)


def _numbers(progress: Progress) -> Text:
    pairs = (
        ("loss", f"{progress.loss:.3f}"),
        ("tokens/s", count(progress.tokens_per_second)),
        ("s/step", f"{progress.step_seconds:.2f}"),
        ("learning rate", f"{progress.learning_rate:.1e}"),
    )
    text = Text()
    for name, value in pairs:
        text.append(f"{name} ", style="dim").append(f"{value}   ", style="bold")
    return text


def _task_table(progress: Progress, num_rows: int) -> Table:
    stages = [stage for stage in _STAGES if stage in progress.scores]
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    table.add_column("task", max_width=28, no_wrap=True, overflow="ellipsis")
    for title in ("loss", *(_STAGES[stage].split(" ")[0] for stage in stages)):
        table.add_column(title, justify="right")
    for task in progress.tasks[:num_rows]:
        loss = progress.task_losses.get(task)
        scores = (score(progress.scores[stage].get(task)) for stage in stages)
        table.add_row(task, "–" if loss is None else f"{loss:.3f}", *scores)
    hidden = len(progress.tasks) - num_rows
    if hidden > 0:
        table.add_row(Text(f"… {hidden} more", style="dim"))
    return table


def _status(progress: Progress) -> Text:
    if progress.outcome is not None:
        return Text(progress.outcome, style="green" if progress.outcome == "finished" else "red")
    notes = [_phase(progress)]
    if progress.evaluated_step and "validation" in progress.scores:
        notes.append(f"evaluated at step {progress.evaluated_step}")
    if progress.checkpoint_step is not None:
        notes.append(f"checkpoint of step {progress.checkpoint_step}")
    return Text(" · ".join(notes), style="dim")


def _phase(progress: Progress) -> str:
    return f"{progress.phase} {progress.phase_count}".rstrip()


def _listed(values: Mapping[str, str]) -> str:
    """Return ` | sst2 0.41  cola 0.61  +5 more`, or nothing."""
    shown: Sequence[str] = [f"{task} {value}" for task, value in list(values.items())[:_LINE_TASKS]]
    more = [f"+{len(values) - _LINE_TASKS} more"] if len(values) > _LINE_TASKS else []
    return " | " + "  ".join([*shown, *more]) if shown else ""


def _plural(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
