"""Workers started by torchrun: ours when the user calls `hyperscale train --launcher torchrun`, or the user's own."""

import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from functools import partial
from itertools import count
from pathlib import Path
from signal import Signals
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from hyperscale.checkpoint.run_folder import claim
from hyperscale.checkpoint.stop_file import clear_stop
from hyperscale.config.cluster import ClusterSettings
from hyperscale.config.engine import EngineSettings
from hyperscale.config.loading import dump_recipe
from hyperscale.config.run import Recipe
from hyperscale.errors import ConfigError, HyperscaleError, ResourceError
from hyperscale.launch.signals import ask_to_stop, stopping_on_signals
from hyperscale.logger import get_logger
from hyperscale.run.context import RunIdentity, RunResult, WorkerContext, ignore, read_result, user_error
from hyperscale.run.stopping import StopRequest
from hyperscale.run.worker import train_worker
from hyperscale.terminal.display import ProgressDisplay

_logger = get_logger(__name__)

_ERROR_FOLDER = "HYPERSCALE_ERROR_FOLDER"
"""The variable that names the folder where workers that we started write their errors. The parent raises one."""

_HINT = "Continue from the last checkpoint with --resume"


def is_worker() -> bool:
    """Return whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_first_process() -> bool:
    """Return whether this process prints the run's result: rank 0 of torchrun's workers, or no worker at all."""
    return not is_worker() or os.environ["RANK"] == "0"


def train_on_torchrun(recipe: Recipe, resume: bool) -> RunResult:
    """Run `cluster.workers` workers under torchrun on this machine; rank 0 writes its progress to the terminal.

    The rendezvous takes a free port. Workers that die, or fail for a transient reason, are started again from the last
    checkpoint, `cluster.max_failures` times at most.

    Raises:
        HyperscaleError: as a worker raised it.
        RunStopped: SIGINT, SIGTERM or `hyperscale stop` ended the run early.
        ResourceError: workers died more often than `cluster.max_failures`.
    """
    for failures in count(1):
        try:
            with stopping_on_signals(partial(ask_to_stop, recipe.output)):
                _run_group(recipe, resume)
            return read_result(recipe.output)
        except HyperscaleError as error:
            left = recipe.cluster.max_failures - failures
            if not error.is_transient or left < 0:
                raise
            lost = str(error).removesuffix(_HINT).rstrip(". ")
            number = f"restart {failures} of {recipe.cluster.max_failures}"
            _logger.warning("%s; restarting all workers from the last checkpoint (%s)", lost, number)
            resume = True
    raise AssertionError("unreachable: the loop above does not end")


def _run_group(recipe: Recipe, resume: bool) -> None:
    """Start the workers once, and wait for them."""
    verbose = _logger.isEnabledFor(logging.DEBUG)
    flags = ["--resume"] * resume + ["--debug"] * verbose
    workers = f"--nproc-per-node={recipe.cluster.workers}"
    # torchrun would answer SIGINT and SIGTERM by ending the workers. Here they save their step first.
    signals = "--signals-to-handle=SIGHUP,SIGQUIT"
    options = ["--standalone", workers, signals, "-m", "hyperscale.launch.torchrun_worker"]
    if not verbose:
        logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="hyperscale-") as scratch:
        file, errors = Path(scratch) / "recipe.json", Path(scratch) / "errors"
        file.write_text(json.dumps(dump_recipe(recipe)), "utf-8")  # with its secrets: the folder is this user's alone
        errors.mkdir()
        threads = os.environ.get("OMP_NUM_THREADS", str(max(1, int(recipe.cluster.cpus_per_worker))))
        with _variables({_ERROR_FOLDER: str(errors), "OMP_NUM_THREADS": threads}):
            try:
                run(parse_args([*options, str(file), *flags]))
            except ChildFailedError as error:
                raise _worker_error(error, errors) from error


@contextmanager
def _variables(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables, which the workers inherit, for the block."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _worker_error(error: ChildFailedError, folder: Path) -> HyperscaleError:
    """Return the first error that a worker has left behind, or how the first worker ended."""
    written = sorted(folder.glob("[0-9]*"), key=lambda file: file.stat().st_mtime_ns)
    if written:
        kind, message, is_transient = json.loads(written[0].read_text("utf-8"))
        return user_error(kind, message, is_transient)
    rank, failure = error.get_first_failure()
    how = f"was killed by {Signals(-failure.exitcode).name}" if failure.exitcode < 0 else "failed; see above"
    return ResourceError(f"worker {rank} {how}. {_HINT}", is_transient=True)


def train_as_worker(recipe: Recipe, resume: bool) -> RunResult:
    """Run this torchrun worker's part of a recipe; returns the result on every rank.

    Raises:
        ConfigError: torchrun started another number of workers than the recipe asks for.
    """
    rank, world_size, local_rank = (int(os.environ[key]) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    with ExitStack() as stack:
        stack.enter_context(_errors_reported_to_parent(rank))
        if world_size != recipe.cluster.workers:
            raise ConfigError(
                f"torchrun started {world_size} workers, the recipe asks for cluster.workers "
                f"{recipe.cluster.workers}; start as many, or set cluster.workers={world_size}"
            )
        consume: Callable[[dict[str, Any]], None] = ignore
        if rank == 0:
            stack.enter_context(claim(recipe.output, resume or _was_restarted()))
            if not _was_restarted():
                clear_stop(recipe.output)
            consume = stack.enter_context(ProgressDisplay(recipe.tracking.progress)).consume
        stack.enter_context(_process_group(recipe.engine, recipe.cluster, local_rank))
        identity = RunIdentity.of(recipe.name, recipe.output)
        stop = StopRequest()
        stack.enter_context(stopping_on_signals(stop.answer_signal, ends_at_second=False))
        train_worker(recipe, WorkerContext(rank, world_size, local_rank, "torchrun", consume, identity, stop))
    return read_result(recipe.output)  # rank 0 wrote it before the process group ended


@contextmanager
def _process_group(engine: EngineSettings, cluster: ClusterSettings, local_rank: int) -> Iterator[None]:
    use_cuda = bool(cluster.gpus_per_worker) and torch.cuda.is_available()
    if use_cuda:
        torch.cuda.set_device(local_rank)
    timeout = timedelta(minutes=engine.communication_timeout_minutes)
    dist.init_process_group("nccl" if use_cuda else "gloo", timeout=timeout)
    try:
        yield
        dist.barrier()  # no worker exits while another still works
    except BaseException:
        dist.destroy_process_group()
        raise
    if use_cuda:
        dist.destroy_process_group()


def leave() -> NoReturn:
    """Exit a finished worker at once, without the interpreter's own shutdown.

    During that shutdown gloo's threads sometimes aborted the process ("terminate called without an active exception",
    in 3 of about 80 runs), and a finished run counted as failed.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


@contextmanager
def _errors_reported_to_parent(rank: int) -> Iterator[None]:
    """In workers that we started, write an error for the parent; otherwise every rank would print it."""
    folder = os.environ.get(_ERROR_FOLDER)
    if folder is None or _logger.isEnabledFor(logging.DEBUG):
        yield
        return
    try:
        yield
    except HyperscaleError as error:
        partial = Path(folder) / f".{rank}"
        partial.write_text(json.dumps([type(error).__name__, str(error), error.is_transient]), "utf-8")
        partial.rename(Path(folder) / str(rank))
        sys.exit(error.exit_code)
    except KeyboardInterrupt:  # a signal before the first step
        sys.exit(130)
    except RuntimeError as error:
        # A peer is gone. The cause is how the peer ended, which torchrun learns from the kernel.
        if "onnection closed by peer" not in str(error) and "onnection reset by peer" not in str(error):
            raise
        sys.exit(1)


def _was_restarted() -> bool:
    """Return whether torchrun restarted the group (`--max-restarts`): then the checkpoints are this run's own."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
