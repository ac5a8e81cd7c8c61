"""What the driver's terminal shows: events, plain lines, the live picture in a real pseudo-terminal, the last page."""

import io
import json
import logging
import os
import pty
import re
import sys
import threading
import time
from dataclasses import replace

import pytest
from rich.console import Console

from hyperscale.config.tracking import ProgressSettings
from hyperscale.terminal.display import ProgressDisplay, live_frame
from hyperscale.terminal.formats import count, duration, gain, score
from hyperscale.terminal.progress import Progress, ProgressSender, advance
from hyperscale.terminal.report import RunSummary, print_report
from hyperscale.training.callbacks import CheckpointRecord, EvaluationRecord, RunFacts, RunOutcome, StepRecord

TASKS = ("sst2", "cola", "a-task-with-a-name-that-is-longer-than-most-columns-are")


def make_evaluation(stage: str, step: int, base: float) -> EvaluationRecord:
    scores = {task: {"accuracy": base + number, "f1": 1.0} for number, task in enumerate(TASKS)}
    return EvaluationRecord(step, stage, scores, dict.fromkeys(TASKS, 1234), seconds=2.0)


def make_step(step: int) -> StepRecord:
    losses = {"cola": 0.5, "sst2": 0.25} if step % 2 else {"sst2": 0.25}
    return StepRecord(step, 40, 0.4, losses, 3e-4, 0.9, 4096, 32, 0.5, 8192.0, (40 - step) * 0.5)


def send_run(sender: ProgressSender) -> None:
    sender.phase("loading the backbone")
    sender.phase("loading the tasks")
    sender.on_run_start(RunFacts("demo", "/runs/demo", {}, TASKS, {}, 2, 3_500_000, 138_000_000, 10, 40, {}))
    sender.on_evaluation(make_evaluation("majority", 0, 50.0))
    for done in range(8):
        sender.phase("evaluating", done, 7)
    sender.on_evaluation(make_evaluation("untouched", 0, 40.0))
    for step in range(11, 41):
        sender.on_step(make_step(step))
    sender.on_checkpoint(CheckpointRecord(40, "/runs/demo/checkpoints/step-000040"))
    sender.on_evaluation(make_evaluation("validation", 40, 80.0))
    sender.on_run_end(RunOutcome("finished", 40, 75.0))


def record_run(min_seconds: float = 0.0) -> list[dict[str, object]]:
    events: list[dict[str, object]] = []
    send_run(ProgressSender(events.append, min_seconds))
    return events


def test_numbers_are_written_for_people() -> None:
    assert [duration(s) for s in (0.4, 59.6, 65, 7620, 97_200, float("nan"))] == [
        "0s",
        "1m 00s",
        "1m 05s",
        "2h 07m",
        "1d 03h",
        "?",
    ]
    assert [count(n) for n in (512.4, 1540, 3_456_789, 7.06e10)] == ["512", "1,540", "3.5 M", "70.6 G"]
    assert [score(None), score(81.25), gain(3.04), gain(-2.0), gain(None)] == ["–", "81.2", "+3.0", "−2.0", "–"]


def test_events_are_json_and_tell_the_whole_run() -> None:
    events = record_run()
    assert json.loads(json.dumps(events)) == events
    progress = Progress()
    for event in events:
        progress = advance(progress, event)
    assert (progress.name, progress.step, progress.start_step, progress.total_steps) == ("demo", 40, 10, 40)
    assert progress.task_losses == pytest.approx({"sst2": 0.25, "cola": 0.5})
    assert progress.scores["validation"]["sst2"] == 80.0
    assert (progress.checkpoint_step, progress.evaluated_step, progress.outcome) == (40, 40, "finished")
    assert advance(progress, {"event": "something a newer version sends"}) == progress
    nan = advance(progress, {"event": "step"} | vars(replace(make_step(39), loss=float("nan"))))
    assert nan.loss != nan.loss
    assert advance(nan, {"event": "step"} | vars(make_step(40))).loss == 0.4


def test_the_sender_spares_its_sink_and_survives_it(caplog: pytest.LogCaptureFixture) -> None:
    steps = [event["step"] for event in record_run(min_seconds=60) if event["event"] == "step"]
    assert steps == [11, 40]

    def broken(event: dict[str, object]) -> None:
        raise ConnectionError("the actor is gone")

    send_run(ProgressSender(broken, min_seconds=0))
    assert caplog.text.count("the actor is gone") == 1


def show(settings: ProgressSettings) -> list[str]:
    stream = io.StringIO()
    with ProgressDisplay(settings, Console(file=stream, width=80, highlight=False)) as display:
        for event in record_run():
            display.consume(event)
    lines = stream.getvalue().splitlines()
    assert all(re.match(r"\d\d:\d\d:\d\d \S", line) for line in lines)
    return [line[9:] for line in lines]


def test_without_a_terminal_it_writes_lines_that_a_log_can_hold() -> None:
    lines = show(ProgressSettings(every_steps=10))
    assert lines == [
        "loading the backbone",
        "loading the tasks",
        "demo: 3 tasks, 40 steps from step 10 on 2 workers; trains 3.5 M of 138.0 M parameters (2.5 %)",
        f"majority class: mean 51.0 | sst2 50.0  cola 51.0  {TASKS[2]} 52.0",
        "evaluating",
        f"untouched backbone: mean 41.0 | sst2 40.0  cola 41.0  {TASKS[2]} 42.0",
        "step 11/40 (28%)  loss 0.400  8,192 tokens/s  14s left | sst2 0.250  cola 0.500",
        "step 20/40 (50%)  loss 0.400  8,192 tokens/s  10s left | sst2 0.250  cola 0.500",
        "step 30/40 (75%)  loss 0.400  8,192 tokens/s  5s left | sst2 0.250  cola 0.500",
        "step 40/40 (100%)  loss 0.400  8,192 tokens/s | sst2 0.250  cola 0.500",
        "checkpoint of step 40",
        f"validation at step 40: mean 81.0 | sst2 80.0  cola 81.0  {TASKS[2]} 82.0",
        "finished at step 40 after 1m 15s",
    ]
    by_time = [line for line in show(ProgressSettings(interval_seconds=3600)) if line.startswith("step")]
    assert [line.split(" ")[1] for line in by_time] == ["11/40", "40/40"]
    assert show(ProgressSettings(enabled=False)) == []


def test_the_live_picture_leaves_log_lines_whole_and_the_terminal_as_it_was() -> None:
    ours, theirs = pty.openpty()
    shown = bytearray()

    def read() -> None:
        try:
            while chunk := os.read(ours, 65536):
                shown.extend(chunk)
        except OSError:  # Linux says EIO when the other side has closed
            pass

    reader = threading.Thread(target=read)
    reader.start()
    threads, stderr = threading.active_count(), sys.stderr
    log = logging.getLogger("hyperscale")
    handler = logging.StreamHandler(sys.stderr)
    log.addHandler(handler)
    try:
        with os.fdopen(theirs, "w") as terminal:
            console = Console(file=terminal, force_terminal=True, width=80, height=24)
            with ProgressDisplay(ProgressSettings(), console) as display:
                for event in record_run():
                    display.consume(event)
                    if event["event"] == "checkpoint":
                        log.warning("a line of the log")
            end = time.monotonic() + 60  # rich stops its refreshing thread and does not wait for it
            while threading.active_count() > threads and time.monotonic() < end:
                time.sleep(0.02)
            assert (threading.active_count(), sys.stderr) == (threads, stderr)
            assert handler.stream is stderr
    finally:
        log.removeHandler(handler)
        reader.join(10)
        os.close(ours)
    text = shown.decode()
    assert "a line of the log" in text
    assert "\x1b[?25h" in text  # the cursor is back
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)
    for words in ("demo", "40/40", "100%", "untouched", "finished"):
        assert words in plain


def test_the_live_picture_fits_its_terminal() -> None:
    progress = Progress()
    for event in record_run()[:-1]:
        progress = advance(progress, event)
    many = replace(progress, tasks=tuple(f"task-{number}" for number in range(300)))
    for width in (80, 120):
        console = Console(file=io.StringIO(), width=width)
        with console.capture() as capture:
            console.print(live_frame(many, width, num_rows=10))
        lines = capture.get().splitlines()
        assert len(lines) <= 15
        assert max(map(len, lines)) <= width
        assert "… 290 more" in capture.get()


def test_the_last_page_shows_every_number_whole_at_any_width() -> None:
    long_path = "/home/someone/" + "deep/" * 20 + "runs/demo"
    summary = RunSummary(
        name="demo",
        step=400,
        seconds=723.0,
        trained=make_evaluation("validation", 400, 81.0),
        untouched=make_evaluation("untouched", 0, 85.0),
        majority=make_evaluation("majority", 0, 50.0),
        places={"run folder": long_path, "MLflow run": "http://host:5000/#/experiments/3/runs/abc"},
        next_commands=(("hyperscale predict BUNDLE --input x.jsonl --output y.jsonl", "answer your own rows"),),
    )
    for width in (80, 120):
        stream = io.StringIO()
        print_report(summary, Console(file=stream, width=width, highlight=False))
        text = stream.getvalue()
        lines = text.splitlines()
        assert "demo: 400 steps in 12m 03s" in lines
        cells = {line.split()[0]: line.split()[1:] for line in lines if line.split()}
        assert cells["task"] == ["metric", "samples", "majority", "untouched", "trained", "gain"]
        assert cells["sst2"] == ["accuracy", "1,234", "50.0", "85.0", "81.0", "−4.0"]
        assert cells["mean"] == ["51.0", "86.0", "82.0", "−4.0"]
        assert "…" not in text
        assert f"run folder  {long_path}" in lines
        assert "MLflow run  http://host:5000/#/experiments/3/runs/abc" in lines
        assert "  hyperscale predict BUNDLE --input x.jsonl --output y.jsonl" in lines

    # A task without a majority class (free text) leaves that mean open rather than wrong.
    partial = replace(summary, majority=replace(make_evaluation("majority", 0, 50.0), scores={"sst2": {"f1": 50.0}}))
    stream = io.StringIO()
    print_report(partial, Console(file=stream, width=100, highlight=False))
    mean = next(line for line in stream.getvalue().splitlines() if line.startswith("mean"))
    assert mean.split() == ["mean", "–", "86.0", "82.0", "−4.0"]
