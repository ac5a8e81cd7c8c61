"""The command line against a real Ray cluster: jobs, and everything that is refused in one line."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from mlflow import MlflowClient

from hyperscale.run.context import read_result
from hyperscale.tracking.jsonl import read_entries
from hyperscale.training.callbacks import CheckpointRecord, RunFacts, RunOutcome, StepRecord
from tests.cluster import BIN, Cluster, errors, free_ports, run, started_cluster, write_project

# MLflow 3.17 under SQLAlchemy 2.1.
pytestmark = pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")

HOLD = "import ray, sys; ray.init(logging_level='ERROR'); held = ray.remote(num_cpus=2)(type('Held', (), {})).remote()"
SAY = "; ray.get(held.__ray_ready__.remote()); print('held', flush=True); sys.stdin.read()"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with started_cluster(num_cpus=2, dashboard=True) as started:
        yield started


@pytest.fixture
def project(tmp_path: Path, tiny_llama_folder: Path) -> Path:
    return write_project(tmp_path / "project", tiny_llama_folder).parent


@contextmanager
def all_cpus_held(cluster: Cluster) -> Iterator[None]:
    """Let another program use the whole cluster."""
    environment = {**cluster.environment, "RAY_ADDRESS": cluster.address}
    command = [sys.executable, "-c", HOLD + SAY]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        yield
        other.communicate("", timeout=60)


def plain_job(cluster: Cluster, project: Path, override: str) -> subprocess.CompletedProcess[str]:
    """Submit a recipe with Ray's own command, as a user who never heard of `hyperscale submit` does."""
    submit = [BIN / "ray", "job", "submit", "--address", cluster.dashboard, "--working-dir", "."]
    return subprocess.run(
        [*submit, "--", "hyperscale", "train", "recipe.yaml", override],
        cwd=project,
        env=dict(cluster.environment),
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )


def test_a_submitted_job_trains_and_leaves_everything_in_the_run_folder(cluster: Cluster, project: Path) -> None:
    output = project.parent / "runs" / "job"
    ended = run(
        *("submit", "recipe.yaml", f"output={output}", "--address", cluster.dashboard),
        environment=cluster.environment,
        folder=project,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "submitted as raysubmit_" in ended.stdout
    assert "SUCCEEDED" in ended.stdout.splitlines()[-1]
    for line in ("starting 2 workers", "small: 1 task, 6 steps on 2 workers", "step 6/6 (100%)", "finished at step 6"):
        assert line in ended.stdout
    for noise in ("Warning", "WARNING", "auth", "[Ray Train]", "(RayTrainWorker", "Traceback"):
        assert noise not in ended.stdout, ended.stdout

    result = read_result(str(output))
    assert result.steps == 6
    assert {Path(bundle).name for bundle in result.bundles.values()} == {"feeling"}
    assert (output / "bundles/feeling/adapter_model.safetensors").is_file()
    records = [entry.record for entry in read_entries(str(output))]
    assert [record.step for record in records if isinstance(record, StepRecord)] == [1, 2, 3, 4, 5, 6]
    saved = [record.step for record in records if isinstance(record, CheckpointRecord)]
    assert saved == [2, 4, 6, 6]  # the last before it is scored, and after
    assert isinstance(records[0], RunFacts)
    assert records[0].world_size == 2
    assert isinstance(records[-1], RunOutcome)
    assert records[-1].status == "finished"
    assert not (output / "ray").exists()
    assert (output / "run.lock").read_text() == ""

    mlflow_run = MlflowClient(f"sqlite:///{project}/mlflow.db").get_run(result.trackers["mlflow"]["run_id"])
    assert mlflow_run.info.status == "FINISHED"
    assert mlflow_run.data.tags["hyperscale.launcher"] == "ray"


@pytest.mark.long
def test_a_plain_job_trains_too(cluster: Cluster, project: Path) -> None:
    output = project.parent / "runs" / "plain"
    ended = plain_job(cluster, project, f"output={output}")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "finished at step 6" in ended.stdout
    assert read_result(str(output)).steps == 6
    assert (output / "bundles/feeling/adapter_model.safetensors").is_file()


def test_a_plain_job_must_not_write_into_its_temporary_folder(cluster: Cluster, project: Path) -> None:
    ended = plain_job(cluster, project, "output=runs/lost")
    assert ended.returncode == 1, ended.stdout + ended.stderr
    (message,) = set(errors(ended.stdout))  # Ray adds the last lines of the log to what it says of the end
    assert "working_dir_files" in message
    assert "which Ray deletes after the job. Give an absolute path" in message


def test_submit_reports_errors_before_it_sends_anything(cluster: Cluster, project: Path) -> None:
    environment = cluster.environment
    relative = run("submit", "recipe.yaml", "--address", cluster.dashboard, environment=environment, folder=project)
    assert relative.returncode == 2
    (message,) = errors(relative.stderr)
    assert f"{project}/recipe.yaml: output=run is a relative path" in message
    assert "output=/shared/runs/NAME" in message
    (port,) = free_ports(1)
    nobody = run(
        *("submit", "recipe.yaml", "output=/shared/run", "--address", f"http://127.0.0.1:{port}"),
        environment=environment,
        folder=project,
    )
    assert nobody.returncode == 1
    (message,) = errors(nobody.stderr)
    assert message.startswith(f"no job could be submitted to http://127.0.0.1:{port}: ")
    assert "--address" in message


def test_missing_cluster_resources_are_one_line(cluster: Cluster, project: Path) -> None:
    environment = {**cluster.environment, "RAY_ADDRESS": cluster.address}

    def error_of(*overrides: str) -> str:
        ended = run("train", "recipe.yaml", *overrides, environment=environment, folder=project)
        assert ended.returncode == 1, ended.stdout + ended.stderr
        assert "Traceback" not in ended.stderr
        (message,) = errors(ended.stderr)
        return message

    message = error_of("cluster.workers=3", "training.batch_size=6")
    assert message.startswith(
        "cluster.workers 3 with 1 CPU each do not fit: the cluster has 2 CPU on 1 node, room for 2."
    )

    (port,) = free_ports(1)
    message = error_of(f"cluster.address=127.0.0.1:{port}")
    assert message.startswith(
        f"no Ray cluster at 127.0.0.1:{port}: Connection refused. Start one with 'ray start --head'"
    )

    with all_cpus_held(cluster):
        message = error_of("cluster.wait_minutes=0.02")
    assert message.startswith("the cluster is busy (2 CPU asked, 0 free) and stayed so for cluster.wait_minutes=0.02")
    assert not (project / "run/checkpoints").exists()


def test_a_user_error_that_only_workers_can_see_ends_the_run_at_once(cluster: Cluster, project: Path) -> None:
    """The rows' place is named by a variable that the driver has and the cluster's nodes do not."""
    task = project / "feeling.yaml"
    task.write_text(task.read_text().replace("feeling.jsonl", "${HYPERSCALE_TEST_ROWS}/feeling.jsonl"))
    variables = {"RAY_ADDRESS": cluster.address, "HYPERSCALE_TEST_ROWS": str(project)}
    ended = run("train", "recipe.yaml", environment={**cluster.environment, **variables}, folder=project)
    assert ended.returncode == 1
    (message,) = errors(ended.stderr)
    assert message.startswith("task 'feeling': the environment variable HYPERSCALE_TEST_ROWS, used in its source")
    assert ended.stderr.count("opening the backbone") == 2, "once in the driver and once in the workers: no second try"
    assert "restarting all workers" not in ended.stderr
    assert "Traceback" not in ended.stderr
    assert json.loads((project / "run/run.lock").read_text() or "null") is None
