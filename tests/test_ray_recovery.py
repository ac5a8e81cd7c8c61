"""kill -9 in the middle of a run under Ray: of a worker, of rank 0, of the driver."""

import os
import re
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file

from hyperscale.run.context import read_result
from hyperscale.tracking.jsonl import METRICS_FILE, read_entries
from hyperscale.training.callbacks import RunFacts, RunOutcome, StepRecord
from tests.cluster import client_environment, run, started_run, wait_for, write_project

# MLflow 3.17 under SQLAlchemy 2.1.
pytestmark = pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")

STEPS = 60
"""Many more than 4, after which a worker is killed: `check_whole` fails where the kill came after the end."""
SCRATCH = re.compile(r"/\w+/hyperscale-ray-\w+")
OVERRIDES = (f"training.steps={STEPS}", "training.checkpoint_every=4", "training.evaluate_untouched=false")


@pytest.fixture
def project(tmp_path: Path, tiny_llama_folder: Path) -> Path:
    return write_project(tmp_path / "project", tiny_llama_folder).parent


def workers_of(driver: subprocess.Popen[bytes], folder: Path) -> dict[int, int]:
    """Return rank -> process id of a run's two workers; rank 0 is the one that writes `metrics.jsonl`."""
    workers = {}
    for process in psutil.Process(driver.pid).children(recursive=True):
        with suppress(psutil.Error):
            if "RayTrainWorker" in " ".join(process.cmdline()):
                files = {file.path for file in process.open_files()}
                workers[0 if str(folder / METRICS_FILE) in files else 1] = process.pid
    return workers


def kill_in_the_middle(driver: subprocess.Popen[bytes], folder: Path, rank: int) -> float:
    """Kill a worker once step 4 is safe; return when."""
    wait_for(lambda: (folder / "checkpoints/step-000004/COMMITTED").exists() or driver.poll() is not None, every=0.02)
    os.kill(workers_of(driver, folder)[rank], signal.SIGKILL)
    return time.time()


def check_whole(project: Path, folder: Path, undisturbed: Path) -> list[RunFacts]:
    """Check that a run has every step once, one finished MLflow run, and the generator of an undisturbed run."""
    records = [entry.record for entry in read_entries(str(folder))]
    assert [record.step for record in records if isinstance(record, StepRecord)] == list(range(1, STEPS + 1))
    assert isinstance(records[-1], RunOutcome)
    assert records[-1].status == "finished"
    assert not (folder / "ray").exists()
    assert not list((folder / "checkpoints").glob(".*")), "half a checkpoint is left"

    client = MlflowClient(f"sqlite:///{project}/mlflow.db")
    experiment = client.get_experiment_by_name("hyperscale")
    assert experiment is not None
    runs = [
        one
        for one in client.search_runs([experiment.experiment_id])
        if one.data.tags["hyperscale.folder"] == str(folder)
    ]
    assert [one.info.status for one in runs] == ["FINISHED"]
    history = client.get_metric_history(runs[0].info.run_id, "train/loss")
    assert {metric.step for metric in history} == set(range(1, STEPS + 1))

    mine, theirs = (
        load_file(Path(read_result(str(run)).checkpoint) / "generator.safetensors") for run in (folder, undisturbed)
    )
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    return [record for record in records if isinstance(record, RunFacts)]


def undisturbed_run(project: Path) -> Path:
    """Run the same recipe without a kill, and without Ray: the launcher makes no difference to a bit."""
    ended = run(
        *("train", "recipe.yaml", *OVERRIDES, "output=undisturbed", "--launcher", "torchrun"),
        environment=client_environment(),
        folder=project,
    )
    assert ended.returncode == 0, ended.stderr
    return project / "undisturbed"


def check_killed_worker(project: Path, rank: int) -> None:
    folder = project / "run"
    with started_run(project, *OVERRIDES) as driver:
        killed = kill_in_the_middle(driver, folder, rank)
        assert driver.wait(timeout=240) == 0, (project / "log.txt").read_text()
    log = (project / "log.txt").read_text()
    assert re.search(
        rf"worker {rank} died .*; restarting all workers from the last checkpoint \(restart 1 of 2\)", log
    ), log
    assert re.search(rf"small: 1 task, {STEPS} steps from step \d+ on 2 workers", log), log
    assert "Traceback" not in log
    assert "failed" not in log
    starts = check_whole(project, folder, undisturbed_run(project))
    assert starts[-1].start_step >= 4
    back = [entry.time for entry in read_entries(str(folder)) if isinstance(entry.record, RunFacts)][-1] - killed
    print(f"worker {rank} killed; the run stepped again {back:.1f} s later")


def test_a_killed_worker_costs_nothing_but_time(project: Path) -> None:
    check_killed_worker(project, rank=1)


def test_a_checkpoint_that_cannot_be_written_for_a_while_costs_a_restart(project: Path) -> None:
    """A file lies where the folder of the checkpoints belongs, until the workers are started again."""
    folder, log = project / "run", project / "log.txt"
    folder.mkdir()
    (folder / "checkpoints").touch()
    with started_run(project, *OVERRIDES, "tracking.mlflow.enabled=false", "cluster.max_failures=1") as driver:
        wait_for(lambda: "restarting all workers" in log.read_text() or driver.poll() is not None)
        (folder / "checkpoints").unlink()
        assert driver.wait(timeout=240) == 0, log.read_text()
    (loss,) = (line for line in log.read_text().splitlines() if "restarting all workers" in line)
    assert "worker 0 failed: CheckpointError: The checkpoint of step 4 cannot be written in" in loss
    assert loss.endswith("(restart 1 of 1)")
    records = [entry.record for entry in read_entries(str(folder))]
    assert [record.step for record in records if isinstance(record, StepRecord)] == list(range(1, STEPS + 1))
    assert [record.start_step for record in records if isinstance(record, RunFacts)][-1] == 0
    assert read_result(str(folder)).steps == STEPS


@pytest.mark.long
def test_a_killed_first_worker_costs_nothing_but_time(project: Path) -> None:
    check_killed_worker(project, rank=0)


@pytest.mark.long
def test_a_killed_driver_leaves_a_run_that_resumes(project: Path) -> None:
    folder = project / "run"
    with started_run(project, *OVERRIDES) as driver:
        wait_for((folder / "checkpoints/step-000004/COMMITTED").exists, every=0.02)
        family = psutil.Process(driver.pid).children(recursive=True)
        workers = [psutil.Process(worker) for worker in workers_of(driver, folder).values()]
        (scratch,) = {Path(word) for process in family for word in SCRATCH.findall(" ".join(process.cmdline()))}
        driver.kill()
        driver.wait()
        _, alive = psutil.wait_procs(workers, timeout=60)
        assert not alive, "workers that outlive their driver would write beside those of the next one"
    # Ray's two agents stay longer than that after a kill -9, and so does the folder, which nobody could delete.
    for process in family:
        with suppress(psutil.Error):
            process.kill()
    shutil.rmtree(scratch)
    ended = run("train", "recipe.yaml", *OVERRIDES, environment=client_environment(), folder=project)
    assert ended.returncode == 1
    assert "holds an earlier run (its last checkpoint is step-0000" in ended.stderr
    ended = run("train", "recipe.yaml", *OVERRIDES, "--resume", environment=client_environment(), folder=project)
    assert ended.returncode == 0, ended.stderr
    assert check_whole(project, folder, undisturbed_run(project))[-1].start_step >= 4
