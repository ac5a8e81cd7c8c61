"""Workers started by torchrun: ours when the user calls `hyperscale train --launcher torchrun`, or the user's own."""

import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from signal import Signals
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from hyperscale.checkpoint.run_folder import claim
from hyperscale.config.run import Recipe
from hyperscale.errors import ConfigError, HyperscaleError, ResourceError
from hyperscale.logger import get_logger
from hyperscale.run.context import RunIdentity, RunResult, WorkerContext, ignore, user_error
from hyperscale.run.worker import train_worker
from hyperscale.terminal.display import ProgressDisplay

_logger = get_logger(__name__)

_ERROR_FOLDER = "HYPERSCALE_MISTAKES"
"""Names the folder in which workers that we have started leave what they found wrong, for the parent to say once."""


def is_worker() -> bool:
    """Return whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def spawn_workers(recipe: Recipe, arguments: Sequence[str]) -> int:
    """Run `cluster.workers` copies of this command under torchrun on this machine; returns 0.

    The rendezvous takes a free port. The workers write to the terminal themselves, rank 0 its progress and the result.

    Raises:
        HyperscaleError: what a worker found wrong, as it said it.
        ResourceError: a worker died.
    """
    verbose = _logger.isEnabledFor(logging.DEBUG)
    options = ["--standalone", f"--nproc-per-node={recipe.cluster.workers}", "-m", "hyperscale.cli"]
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, int(recipe.cluster.cpus_per_worker))))
    if not verbose:
        logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="hyperscale-") as mistakes:
        os.environ[_ERROR_FOLDER] = mistakes
        try:
            run(parse_args([*options, *arguments]))
        except ChildFailedError as error:
            raise _worker_error(error, Path(mistakes)) from error
        finally:
            del os.environ[_ERROR_FOLDER]
    return 0


def _worker_error(error: ChildFailedError, mistakes: Path) -> HyperscaleError:
    """Return the first mistake that a worker has left behind, or how the first worker ended."""
    written = sorted(mistakes.iterdir(), key=lambda file: file.stat().st_mtime_ns)
    if written:
        return user_error(*json.loads(written[0].read_text("utf-8")))
    rank, failure = error.get_first_failure()
    how = f"was killed by {Signals(-failure.exitcode).name}" if failure.exitcode < 0 else "failed; see above"
    return ResourceError(f"worker {rank} {how}. Continue from the last checkpoint with --resume")


def train_as_worker(recipe: Recipe, resume: bool) -> RunResult | None:
    """Run this torchrun worker's part of a recipe; the result comes on rank 0.

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
            consume = stack.enter_context(ProgressDisplay(recipe.tracking.progress)).consume
        stack.enter_context(_process_group(recipe, local_rank))
        identity = RunIdentity.of(recipe.name, recipe.output)
        return train_worker(recipe, WorkerContext(rank, world_size, local_rank, "torchrun", consume, identity))


@contextmanager
def _process_group(recipe: Recipe, local_rank: int) -> Iterator[None]:
    use_cuda = bool(recipe.cluster.gpus_per_worker) and torch.cuda.is_available()
    if use_cuda:
        torch.cuda.set_device(local_rank)
    timeout = timedelta(minutes=recipe.engine.communication_timeout_minutes)
    dist.init_process_group("nccl" if use_cuda else "gloo", timeout=timeout)
    try:
        yield
        dist.barrier()  # nobody leaves while another still works
    except BaseException:
        dist.destroy_process_group()
        raise
    if use_cuda:
        dist.destroy_process_group()


def leave() -> NoReturn:
    """End a worker that has done its part, at once.

    On the interpreter's own way out gloo's threads aborted the process now and then ("terminate called without an
    active exception", seen in 3 of about 80 runs), and a run that had finished counted as one that failed.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


@contextmanager
def _errors_reported_to_parent(rank: int) -> Iterator[None]:
    """Under `spawn_workers`, let the parent say once what all ranks, or a rank's peers, would say at the same time."""
    folder = os.environ.get(_ERROR_FOLDER)
    if folder is None or _logger.isEnabledFor(logging.DEBUG):
        yield
        return
    try:
        yield
    except HyperscaleError as error:
        partial = Path(folder).with_suffix(f".{rank}")
        partial.write_text(json.dumps([type(error).__name__, str(error)]), "utf-8")
        partial.rename(Path(folder) / str(rank))
        sys.exit(error.exit_code)
    except RuntimeError as error:
        # A peer is gone: what became of it is the news, which torchrun hears from the kernel.
        if "onnection closed by peer" not in str(error) and "onnection reset by peer" not in str(error):
            raise
        sys.exit(1)


def _was_restarted() -> bool:
    """Return whether torchrun restarted the group (`--max-restarts`): then the checkpoints are this run's own."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
