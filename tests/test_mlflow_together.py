"""Runs that start in one moment and share a database that is not there yet."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

# MLflow 3.17 under SQLAlchemy 2.1.
pytestmark = pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")

OPEN = """
import sys, time
from hyperscale.config.tracking import MlflowSettings
from hyperscale.tracking.mlflow_run import open_run

root, key, start = sys.argv[1:]
time.sleep(max(0.0, float(start) - time.time()))
open_run(MlflowSettings(), root, key, key, None)
"""


def test_runs_that_start_together_share_a_new_database(tmp_path: Path):
    root = tmp_path / "runs"
    start = str(time.time() + 8)  # after the slowest of the imports
    keys = ["one", "two", "three"]
    started = [
        subprocess.Popen([sys.executable, "-c", OPEN, str(root), key, start], stderr=subprocess.PIPE, text=True)
        for key in keys
    ]
    errors = [process.communicate(timeout=120)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], errors
    client = MlflowClient(f"sqlite:///{root}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("hyperscale").experiment_id])
    assert {run.info.run_name for run in runs} == set(keys)
    assert sorted(path.name for path in root.iterdir()) == [".mlflow.db.lock", "mlflow.db"]
