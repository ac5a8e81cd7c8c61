"""One plain process: no Ray, no torchrun. For debugging, small models, and a machine with one GPU."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from hyperscale.checkpoint.run_folder import claim
from hyperscale.checkpoint.stop_file import clear_stop
from hyperscale.config.cluster import ClusterSettings
from hyperscale.config.engine import EngineSettings
from hyperscale.config.run import Recipe
from hyperscale.errors import ConfigError, ResourceError
from hyperscale.launch.signals import stopping_on_signals
from hyperscale.run.context import RunIdentity, RunResult, WorkerContext, read_result
from hyperscale.run.stopping import StopRequest
from hyperscale.run.worker import train_worker
from hyperscale.terminal.display import ProgressDisplay


def require_one_worker(cluster: ClusterSettings) -> None:
    """Raise `ConfigError` if a recipe asks for more than one worker."""
    if cluster.workers != 1:
        raise ConfigError(
            f"--launcher local runs one worker, the recipe asks for cluster.workers {cluster.workers}; "
            "set cluster.workers=1 or use --launcher torchrun"
        )


def train_in_process(recipe: Recipe, resume: bool) -> RunResult:
    """Run a recipe with one worker in this process.

    Raises:
        ConfigError: the recipe asks for several workers.
        RunStopped: SIGINT, SIGTERM or `hyperscale stop` ended the run early.
    """
    require_one_worker(recipe.cluster)
    with ExitStack() as stack:
        stop = StopRequest()
        stack.enter_context(stopping_on_signals(stop.answer_signal))
        stack.enter_context(claim(recipe.output, resume))
        clear_stop(recipe.output)
        display = stack.enter_context(ProgressDisplay(recipe.tracking.progress))
        stack.enter_context(process_group(recipe.engine, recipe.cluster))
        identity = RunIdentity.of(recipe.name, recipe.output)
        result = train_worker(recipe, WorkerContext(0, 1, 0, "local", display.consume, identity, stop))
    assert result is not None, "rank 0 returns the result"
    return result


def train_in_child(recipe: Recipe, file: Path, log: Path) -> RunResult:
    """Run a recipe, which is also `file`, as `train_in_process` does, in a process of its own that writes to `log`.

    It resumes from the run folder. `file` holds no secrets; the process finds them in its environment.

    Raises:
        ConfigError, ResourceError: the error that the run printed, or how its process ended.
    """
    command = [sys.executable, "-m", "hyperscale.cli", "train", str(file), "--launcher", "local", "--resume"]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        environment = os.environ | recipe.tracking.secret_variables()
        code = subprocess.run(command, env=environment, stdout=output, stderr=subprocess.STDOUT, check=False).returncode
    if code == 0:
        return read_result(recipe.output)
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")] or lines[-1:]
    if code == -signal.SIGKILL:
        errors = ["its process was killed, perhaps for lack of memory; fewer --jobs leave more memory for each run"]
    message = "\n".join([*errors, f"(exit code {code}; its whole output is in {log})"])
    raise ConfigError(message) if code == ConfigError.exit_code else ResourceError(message)


@contextmanager
def process_group(engine: EngineSettings, cluster: ClusterSettings) -> Iterator[None]:
    """Create the process group of one rank that DeepSpeed needs; nothing listens on a port."""
    if engine.kind != "zero":
        yield
        return
    before = {key: os.environ.get(key) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    backend = "nccl" if cluster.gpus_per_worker and torch.cuda.is_available() else "gloo"
    timeout = timedelta(minutes=engine.communication_timeout_minutes)
    store = dist.HashStore()  # type: ignore[attr-defined]  # public, but torch's annotations hide it
    dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
    try:
        yield
    finally:
        dist.destroy_process_group()
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value
