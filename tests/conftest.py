"""What every test may use."""

import os
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.ranks import Ranks

# Two ranks share two cores in many tests; a worker that inherits more threads than one slows its peer down.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here may need a model hub
# Offline, MLflow's telemetry removes its environment variable in a thread, and a request that reads them then fails.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
_ENCODED = tempfile.TemporaryDirectory(prefix="hyperscale-tests-")
os.environ["HYPERSCALE_DATA_CACHE"] = _ENCODED.name  # the user's own cache stays as it is


@pytest.fixture(scope="session")
def task_data() -> Path:
    """The folder of development data sets (`<task>/{train,validation,test}.jsonl`) that lies beside some checkouts."""
    folder = os.environ.get("HYPERSCALE_TASK_DATA")
    if not folder:
        pytest.skip("left out: HYPERSCALE_TASK_DATA names no folder of task data")
    path = Path(folder)
    if not path.is_dir():
        pytest.fail(f"HYPERSCALE_TASK_DATA={folder} is not a folder")
    return path


@pytest.fixture(scope="module")
def two_ranks() -> Iterator["Ranks"]:
    """Two processes that share a gloo group; the tests of one file use the same two."""
    from tests.ranks import started_ranks

    with started_ranks(2) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The files of small written tasks, see `runs.write_tasks`."""
    from tests.runs import write_tasks

    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="session")
def tiny_llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA of two layers with random weights; not to be written to."""
    from tests import tiny

    return tiny.tiny_llama(tmp_path_factory.mktemp("backbones") / "tiny-llama")


@pytest.fixture(scope="session")
def tiny_t5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 v1.1 of two and two layers with random weights; not to be written to."""
    from tests import tiny

    return tiny.tiny_t5(tmp_path_factory.mktemp("backbones") / "tiny-t5")


@pytest.fixture(autouse=True)
def _same_environment() -> Iterator[None]:
    """A test leaves the environment and the working folder as it found them."""
    before, folder = dict(os.environ), Path.cwd()
    yield
    os.chdir(folder)
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update({name: value for name, value in before.items() if os.environ.get(name) != value})


@pytest.fixture
def nothing_is_left_behind() -> Iterator[None]:
    """Fail a test that leaves a thread running or the environment changed."""

    def environment() -> dict[str, str]:
        return {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "_MLFLOW_"))}

    before, threads = environment(), set(threading.enumerate())
    yield
    assert environment() == before
    deadline = time.monotonic() + 5
    while set(threading.enumerate()) - threads and time.monotonic() < deadline:
        time.sleep(0.05)
    assert set(threading.enumerate()) <= threads
