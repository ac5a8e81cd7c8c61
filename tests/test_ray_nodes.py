"""Two Ray nodes on this machine, of which one truly does not see what the other does."""

import subprocess
from pathlib import Path

import pytest

from tests.cluster import another_node, errors, run, started_cluster, write_project

CAN_HIDE = subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode == 0


@pytest.mark.long
@pytest.mark.skipif(not CAN_HIDE, reason="left out: hiding a folder from a node needs the right to unshare mounts")
def test_a_run_over_two_nodes_needs_a_shared_folder_and_a_tracking_server(
    tmp_path: Path, tiny_llama_folder: Path
) -> None:
    project = write_project(tmp_path / "project", tiny_llama_folder).parent
    hidden, shared = tmp_path / "hidden", tmp_path / "shared"
    hidden.mkdir()
    with started_cluster(num_cpus=1) as cluster, another_node(cluster, 1, hidden):
        environment = {**cluster.environment, "RAY_ADDRESS": cluster.address}

        def error_of_run(output: Path) -> str:
            ended = run("train", "recipe.yaml", f"output={output}", environment=environment, folder=project)
            assert ended.returncode == 1, ended.stdout + ended.stderr
            (message,) = errors(ended.stderr)
            return message

        assert f"output={hidden}/run is private to this node: " in error_of_run(hidden / "run")
        assert error_of_run(shared / "run").startswith(
            "tracking.mlflow.uri: an SQLite file cannot be written from several"
        )

        server = "tracking.mlflow.enabled=false"
        ended = run("train", "recipe.yaml", server, f"output={shared}/run", environment=environment, folder=project)
        assert ended.returncode == 0, ended.stderr
        assert "finished at step 6" in ended.stderr
