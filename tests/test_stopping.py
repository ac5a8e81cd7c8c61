"""SIGINT, SIGTERM and `hyperscale stop` in the middle of a run: its current step is saved, and it goes on bitwise."""

import os
import signal
import subprocess
from pathlib import Path

import psutil
import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file

from hyperscale.tracking.jsonl import read_entries
from hyperscale.training.callbacks import EvaluationRecord, RunOutcome, StepRecord
from tests.cluster import client_environment, errors, run, started_run, wait_for, write_project

# MLflow 3.17 under SQLAlchemy 2.1.
pytestmark = pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")

STEPS = 120
"""Many more than pass between the first checkpoint and the end of the run."""
OVERRIDES = (
    f"training.steps={STEPS}",
    "training.checkpoint_every=4",
    "training.evaluate_untouched=false",
    "training.evaluate_every=50",
    "data.validation_limit=4",
)
LOCAL = ("--launcher", "local", "cluster.workers=1")
TORCHRUN = ("--launcher", "torchrun")


@pytest.fixture
def project(tmp_path: Path, tiny_llama_folder: Path) -> Path:
    return write_project(tmp_path / "project", tiny_llama_folder).parent


def step_records(folder: Path) -> list[StepRecord]:
    return [entry.record for entry in read_entries(str(folder)) if isinstance(entry.record, StepRecord)]


def outcomes(folder: Path) -> list[RunOutcome]:
    return [entry.record for entry in read_entries(str(folder)) if isinstance(entry.record, RunOutcome)]


def lives(process: psutil.Process) -> bool:
    """Return whether a process runs; one that has ended may wait for init to take note of it."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_for_a_checkpoint(process: subprocess.Popen[bytes], folder: Path) -> None:
    """Wait until step 4 is saved, so that the next steps are not."""
    wait_for(lambda: (folder / "checkpoints/step-000004/COMMITTED").exists() or process.poll() is not None, every=0.02)


def check_stopped(project: Path, folder: Path, by: str) -> int:
    """Check that a run has printed, saved and recorded its last step; return the step."""
    log = (project / "log.txt").read_text()
    assert "Traceback" not in log
    last = step_records(folder)[-1].step
    checkpoint = folder / f"checkpoints/step-{last:06d}"
    assert log.splitlines()[-1] == f"stopped by {by} after step {last}; {checkpoint} is saved: continue with --resume"
    assert (checkpoint / "COMMITTED").exists()
    assert [(outcome.status, outcome.step) for outcome in outcomes(folder)] == [("stopped", last)]
    assert last < STEPS
    client = MlflowClient(f"sqlite:///{project}/mlflow.db")
    experiment = client.get_experiment_by_name("hyperscale")
    assert experiment is not None
    mlflow_run = client.search_runs([experiment.experiment_id])[0]
    assert mlflow_run.info.status == "KILLED"
    losses = client.get_metric_history(mlflow_run.info.run_id, "train/loss")
    assert max(metric.step for metric in losses) == last
    return last


def check_same_end(folder: Path, undisturbed: Path) -> None:
    """Check that a stopped and continued run has the losses, scores and generator of one that was never stopped."""
    mine, theirs = step_records(folder), step_records(undisturbed)
    assert [record.step for record in mine] == list(range(1, STEPS + 1))
    assert [record.loss for record in mine] == [record.loss for record in theirs]
    scores = [
        [
            (entry.record.step, entry.record.stage, entry.record.scores)
            for entry in read_entries(str(one))
            if isinstance(entry.record, EvaluationRecord)
        ]
        for one in (folder, undisturbed)
    ]
    assert scores[0] == scores[1]
    tensors = [load_file(one / f"checkpoints/step-{STEPS:06d}/generator.safetensors") for one in (folder, undisturbed)]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])


CASES = [
    pytest.param(LOCAL, signal.SIGTERM, id="local-SIGTERM"),
    pytest.param(LOCAL, signal.SIGINT, id="local-SIGINT", marks=pytest.mark.long),
    pytest.param(TORCHRUN, signal.SIGTERM, id="torchrun-SIGTERM", marks=pytest.mark.long),
    pytest.param(TORCHRUN, signal.SIGINT, id="torchrun-SIGINT", marks=pytest.mark.long),
    pytest.param((), signal.SIGTERM, id="ray-SIGTERM", marks=pytest.mark.long),
    pytest.param((), signal.SIGINT, id="ray-SIGINT", marks=pytest.mark.long),
]


@pytest.mark.parametrize(("launcher", "number"), CASES)
def test_a_signal_saves_the_step_and_the_run_goes_on_bitwise(
    project: Path, launcher: tuple[str, ...], number: signal.Signals
) -> None:
    folder, undisturbed = project / "run", project / "undisturbed"
    with started_run(project, *OVERRIDES, *launcher, f"output={folder}") as process:
        wait_for_a_checkpoint(process, folder)
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)
        assert process.wait(timeout=60) == 128 + number
    psutil.wait_procs(children, timeout=20)
    assert [child for child in children if lives(child)] == []
    check_stopped(project, folder, by=number.name)

    environment = client_environment()
    for arguments in ((f"output={folder}", "--resume"), (f"output={undisturbed}",)):
        done = run("train", "recipe.yaml", *OVERRIDES, *launcher, *arguments, environment=environment, folder=project)
        assert done.returncode == 0, done.stderr
    check_same_end(folder, undisturbed)


def test_the_stop_command_waits_for_the_run_to_end(project: Path) -> None:
    folder, environment = project / "run", client_environment()
    with started_run(project, *OVERRIDES, *LOCAL, f"output={folder}") as process:
        wait_for_a_checkpoint(process, folder)
        stopped = run("stop", folder, environment=environment, folder=project)
        assert process.wait(timeout=20) == 143
    assert (stopped.returncode, stopped.stderr) == (0, "")
    assert stopped.stdout == f"the run in {folder} has stopped; continue it with --resume\n"
    check_stopped(project, folder, by="hyperscale stop")
    again = run("stop", folder, environment=environment, folder=project)
    assert again.returncode == 1
    assert errors(again.stderr) == [f"{folder}: no run writes there. Give the folder of a run that is training"]


def test_a_signal_before_the_first_step_ends_the_run_at_once(project: Path) -> None:
    folder = project / "run"
    with started_run(project, *OVERRIDES, *LOCAL, f"output={folder}") as process:
        wait_for(lambda: (folder / "run.lock").exists() or process.poll() is not None, every=0.02)
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(timeout=60) == 143
    log = (project / "log.txt").read_text()
    assert "Traceback" not in log
    assert log.splitlines()[-1] == "stopped; committed checkpoints are kept: continue a run with --resume"
