"""What a run asks of a cluster, in numbers and messages."""

from pathlib import Path

import pytest

from hyperscale.config.cluster import ClusterSettings
from hyperscale.config.run import Recipe
from hyperscale.launch.resources import ephemeral_output_problem, required_resources, several_nodes_problem, shortfall


def settings(**fields: float) -> ClusterSettings:
    return ClusterSettings.model_validate(fields)


def recipe(**mlflow: object) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "run",
            "output": "/runs/one",
            "backbone": {"name": "tiny"},
            "data": {"tasks": ["one"]},
            "training": {"steps": 20},
            "tracking": {"mlflow": mlflow},
        }
    )


@pytest.mark.parametrize(("gpus", "reason"), [(0.5, "workers cannot share one"), (4, "would leave the others idle")])
def test_a_worker_has_one_gpu_or_none(gpus: float, reason: str) -> None:
    with pytest.raises(ValueError, match=f"{gpus:g} is not allowed: must be 1, or 0 for CPUs .*{reason}"):
        settings(gpus_per_worker=gpus)


def test_requested_resources_are_totals_with_gpus_only_if_used() -> None:
    assert required_resources(settings(workers=3, cpus_per_worker=1.5)) == {"CPU": 4.5}
    assert required_resources(settings(workers=2, gpus_per_worker=1, cpus_per_worker=4)) == {"CPU": 8, "GPU": 2}


@pytest.mark.parametrize(
    ("workers", "each", "nodes"),
    [
        (2, {}, [{"CPU": 2.0}]),
        (3, {}, [{"CPU": 2.0}, {"CPU": 1.0}]),
        (10, {"cpus_per_worker": 0.1}, [{"CPU": 1.0}]),  # 1.0 / 0.1 falls short of 10 in binary
        (8, {"gpus_per_worker": 1}, [{"CPU": 64.0, "GPU": 4.0}] * 2 + [{"CPU": 16.0}]),
    ],
)
def test_what_fits(workers: int, each: dict[str, float], nodes: list[dict[str, float]]) -> None:
    assert shortfall(settings(workers=workers, **each), nodes) is None


@pytest.mark.parametrize(
    ("workers", "each", "nodes", "message"),
    [
        (
            3,
            {},
            [{"CPU": 2.0}],
            (
                "cluster.workers 3 with 1 CPU each do not fit: the cluster has 2 CPU on 1 node, room for 2. "
                "Set cluster.workers=2, or add nodes"
            ),
        ),
        (  # five CPUs in all, but a worker cannot be spread over nodes
            2,
            {"cpus_per_worker": 3},
            [{"CPU": 3.0}, {"CPU": 2.0}],
            (
                "cluster.workers 2 with 3 CPU each do not fit: the cluster has 5 CPU on 2 nodes, room for 1. "
                "Set cluster.workers=1, or add nodes"
            ),
        ),
        (
            1,
            {"cpus_per_worker": 4},
            [{"CPU": 2.0}, {"CPU": 2.0}],
            (
                "cluster.workers 1 with 4 CPU each do not fit: the cluster has 4 CPU on 2 nodes, room for 0. "
                "Lower cluster.cpus_per_worker, or add nodes"
            ),
        ),
        (
            1,
            {"gpus_per_worker": 1},
            [{"CPU": 2.0}],
            (
                "cluster.workers 1 with 1 CPU, 1 GPU each do not fit: the cluster has 2 CPU, 0 GPU on 1 node, "
                "room for 0. Lower cluster.gpus_per_worker (0 = run on CPUs), or add nodes"
            ),
        ),
        (
            1,
            {},
            [],
            (
                "cluster.workers 1 with 1 CPU each do not fit: the cluster has 0 CPU on 0 nodes, room for 0. "
                "Lower cluster.cpus_per_worker, or add nodes"
            ),
        ),
    ],
)
def test_shortfalls_of_resources(
    workers: int, each: dict[str, float], nodes: list[dict[str, float]], message: str
) -> None:
    assert shortfall(settings(workers=workers, **each), nodes) == message


def test_several_nodes_need_a_shared_folder_and_a_tracking_server() -> None:
    server = recipe(uri="http://mlflow:5000")
    assert several_nodes_problem(server.output, server.tracking, []) is None
    without = recipe(enabled=False)
    assert several_nodes_problem(without.output, without.tracking, []) is None
    blind = several_nodes_problem(server.output, server.tracking, ["b (10.0.0.2)", "a (10.0.0.1)"])
    assert blind is not None
    assert blind.startswith("output=/runs/one is private to this node: a (10.0.0.1), b (10.0.0.2) cannot see it. ")
    for uri in (None, "sqlite:////runs/mlflow.db"):
        problem = several_nodes_problem(server.output, recipe(uri=uri).tracking, [])
        assert problem is not None
        assert problem.startswith("tracking.mlflow.uri: an SQLite file cannot be written from several nodes.")


def test_a_job_must_not_write_into_its_temporary_folder() -> None:
    inside = "/scratch/ray/session_1/runtime_resources/working_dir_files/_ray_pkg_0123456789abcdef/runs/demo"
    message = ephemeral_output_problem(inside)
    assert message is not None
    assert inside in message
    assert "output=/shared/runs/NAME" in message
    for lasting in ("/shared/runs/demo", "s3://bucket/runs/demo", str(Path.home() / "runs")):
        assert ephemeral_output_problem(lasting) is None
