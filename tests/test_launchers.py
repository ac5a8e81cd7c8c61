"""The launchers that need no Ray: one plain process, and torchrun."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from hyperscale.checkpoint.run_folder import claim
from hyperscale.errors import ConfigError
from hyperscale.launch.local import train_in_process
from hyperscale.run.context import read_result
from hyperscale.tracking.jsonl import read_entries
from hyperscale.training.callbacks import StepRecord
from tests.cluster import HYPERSCALE, client_environment, errors, run, wait_for, write_project
from tests.runs import make_recipe

WITHOUT_VENDORS = """
import sys
from importlib.machinery import PathFinder

class WithoutVendors(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        missing = name.partition(".")[0] in ("ray", "mlflow", "deepspeed")
        return None if missing else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutVendors
from hyperscale.cli import main
code = main(sys.argv[1:])
assert not {"ray", "mlflow", "deepspeed"}.intersection(sys.modules)
sys.exit(code)
"""
ALONE = ("--launcher", "local", "cluster.workers=1", "engine.kind=local")
NO_MLFLOW = "tracking.mlflow.enabled=false"


@pytest.fixture
def project(tmp_path: Path, tiny_llama_folder: Path) -> Path:
    return write_project(tmp_path / "project", tiny_llama_folder).parent


def test_one_process_trains_where_ray_mlflow_and_deepspeed_are_missing(project: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", WITHOUT_VENDORS, "train", "recipe.yaml", *ALONE, NO_MLFLOW],
        cwd=project,
        env=client_environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert ended.returncode == 0, ended.stderr
    assert "small: 6 steps" in ended.stdout
    result = read_result(str(project / "run"))
    assert result.steps == 6
    assert result.trackers == {}
    assert (project / "run/bundles/feeling/adapter_config.json").is_file()
    assert not (project / "mlflow.db").exists()


def test_one_process_is_one_worker(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path / "backbone", ["task"], tmp_path / "run", cluster={"workers": 2})
    with pytest.raises(ConfigError, match=r"--launcher local runs one worker, the recipe asks for cluster.workers 2"):
        train_in_process(recipe, resume=False)
    assert not (tmp_path / "run").exists()


def test_a_user_error_under_torchrun_is_printed_once(project: Path) -> None:
    """Rank 0 finds the folder busy while rank 1 waits for it: the user reads a line, not torchrun's report."""
    with claim(str(project / "run"), resume=False):
        ended = run("train", "recipe.yaml", "--launcher", "torchrun", environment=client_environment(), folder=project)
    assert ended.returncode == 1
    (message,) = errors(ended.stderr)
    assert message.startswith("The run folder is busy: process ")
    for noise in ("Traceback", "ChildFailedError", "exitcode", "torch.distributed"):
        assert noise not in ended.stderr, ended.stderr


def test_a_worker_killed_under_torchrun_is_named_and_the_run_resumes(project: Path) -> None:
    folder = project / "run"
    arguments = ["train", "recipe.yaml", "--launcher", "torchrun", NO_MLFLOW, "training.steps=60"]
    arguments += ["cluster.max_failures=0"]
    log = project / "log.txt"
    with log.open("wb") as output:
        parent = subprocess.Popen(
            [HYPERSCALE, *arguments], cwd=project, env=client_environment(), stdout=output, stderr=output
        )
    wait_for(lambda: (folder / "checkpoints/step-000002/COMMITTED").exists() or parent.poll() is not None, every=0.02)
    os.kill(second_worker(parent.pid), signal.SIGKILL)
    assert parent.wait(timeout=120) == 1
    (message,) = errors(log.read_text())
    assert message == "worker 1 was killed by SIGKILL. Continue from the last checkpoint with --resume"
    assert "Traceback" not in log.read_text()

    ended = run(*arguments, "--resume", environment=client_environment(), folder=project)
    assert ended.returncode == 0, ended.stderr
    assert "60 steps from step " in ended.stderr
    records = [entry.record for entry in read_entries(str(folder))]
    assert [record.step for record in records if isinstance(record, StepRecord)] == list(range(1, 61))


def test_a_killed_worker_and_a_passing_storage_error_are_survived_under_torchrun(project: Path) -> None:
    """First no checkpoint can be written, then a worker is killed."""
    folder, log = project / "run", project / "log.txt"
    folder.mkdir()
    (folder / "checkpoints").touch()
    arguments = ["train", "recipe.yaml", "--launcher", "torchrun", NO_MLFLOW, "training.steps=60"]
    with log.open("wb") as output:
        parent = subprocess.Popen(
            [HYPERSCALE, *arguments], cwd=project, env=client_environment(), stdout=output, stderr=output
        )
    wait_for(lambda: "(restart 1 of 2)" in log.read_text() or parent.poll() is not None)
    (folder / "checkpoints").unlink()
    wait_for(lambda: (folder / "checkpoints/step-000002/COMMITTED").exists() or parent.poll() is not None, every=0.02)
    os.kill(second_worker(parent.pid), signal.SIGKILL)
    assert parent.wait(timeout=240) == 0, log.read_text()
    losses = [line for line in log.read_text().splitlines() if "restarting all workers" in line]
    assert len(losses) == 2
    assert "The checkpoint of step 2 cannot be written in" in losses[0]
    assert "worker 1 was killed by SIGKILL; restarting all workers from the last checkpoint" in losses[1]
    records = [entry.record for entry in read_entries(str(folder))]
    assert [record.step for record in records if isinstance(record, StepRecord)] == list(range(1, 61))


def second_worker(parent: int) -> int:
    """Return the process of rank 1."""
    for process in psutil.Process(parent).children():
        with suppress(psutil.Error):
            if process.environ().get("RANK") == "1":
                return process.pid
    pytest.fail(f"no worker of rank 1 below {parent}")
