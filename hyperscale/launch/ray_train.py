"""Ray Train workers for a recipe: run them, show their progress, and restart them after a failure.

Checkpoints are our own, in a run folder that all nodes see. Nothing is reported to Ray Train, because its reports wait
for a 2 s poll and can be lost with a killed worker. A restarted group continues from the newest complete checkpoint.
"""

import logging
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from hyperscale.checkpoint.run_folder import claim
from hyperscale.checkpoint.stop_file import clear_stop
from hyperscale.config.loading import dump_recipe, parse_recipe
from hyperscale.config.run import Recipe
from hyperscale.errors import HyperscaleError, ResourceError, RunFolderError, RunStopped
from hyperscale.launch.ray_cluster import check_capacity, check_shared_folder, join_cluster, wait_for_resources
from hyperscale.launch.resources import ephemeral_output_problem, required_resources
from hyperscale.launch.signals import ask_to_stop, stopping_on_signals
from hyperscale.logger import get_logger
from hyperscale.places import open_place
from hyperscale.run.context import RunIdentity, RunResult, WorkerContext, ignore, read_result, user_error
from hyperscale.run.worker import record_end_of_run, train_worker
from hyperscale.terminal.display import ProgressDisplay

_logger = get_logger(__name__)

_POLL_SECONDS = 0.5


def train_on_ray(recipe: Recipe, resume: bool) -> RunResult:
    """Run a recipe's workers on the cluster of `cluster.address`, of RAY_ADDRESS, or on one started here.

    Raises:
        ResourceError: the cluster cannot be joined or lacks what the workers need.
        RunFolderError: the run folder is busy, private to one node, or holds another run.
        HyperscaleError: the error that a worker raised.
    """
    problem = ephemeral_output_problem(recipe.output)
    if problem:
        raise RunFolderError(problem)
    with ExitStack() as stack:
        display = stack.enter_context(ProgressDisplay(recipe.tracking.progress))

        def show_phase(text: str) -> None:
            display.consume({"event": "phase", "text": text, "done": None, "total": None})

        stack.enter_context(stopping_on_signals(lambda _name: False))
        stack.enter_context(claim(recipe.output, resume))
        clear_stop(recipe.output)
        run = RunIdentity.of(recipe.name, recipe.output)
        show_phase("starting Ray")
        stack.enter_context(join_cluster(recipe.cluster.address))
        check_capacity(recipe.cluster)
        check_shared_folder(recipe.output, recipe.tracking)
        wait_for_resources(recipe.cluster, show_phase)
        mailbox = _mailbox()
        stack.enter_context(_delivery(mailbox, display))
        show_phase(f"starting {recipe.cluster.workers} workers")
        try:
            with stopping_on_signals(partial(ask_to_stop, recipe.output)):  # after Ray, which sets handlers of its own
                _in_thread(partial(_fit, recipe, mailbox, run))
        except RunStopped:
            raise  # rank 0 has recorded it
        except HyperscaleError as error:
            record_end_of_run(recipe.tracking, recipe.output, run, "failed", str(error))
            raise
        except KeyboardInterrupt:
            record_end_of_run(recipe.tracking, recipe.output, run, "stopped", "ended by a signal")
            raise
    return read_result(recipe.output)


def _in_thread(action: Callable[[], None]) -> None:
    """Run an action in a thread and wait for it, so that signals reach this thread and not what the action waits for.

    Ray Train takes SIGINT for itself where it runs in the main thread, and ends the driver without a word.
    """
    errors: list[BaseException] = []

    def run() -> None:
        try:
            action()
        except BaseException as error:  # noqa: BLE001 - raised again in the thread that waits
            errors.append(error)

    thread = threading.Thread(target=run, name="hyperscale-workers", daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


@ray.remote(num_cpus=0, max_restarts=0)
class _Mailbox:
    """Carries events from rank 0, on any node, to the driver's terminal, and keeps the first user error."""

    def __init__(self) -> None:
        self._events: list[dict[str, Any]] = []
        self._user_error: tuple[str, str] | None = None

    def put(self, event: dict[str, Any]) -> None:
        self._events.append(event)

    def take(self) -> list[dict[str, Any]]:
        events, self._events = self._events, []
        return events

    def report_user_error(self, kind: str, message: str) -> None:
        self._user_error = self._user_error or (kind, message)

    def first_user_error(self) -> tuple[str, str] | None:
        return self._user_error


def _mailbox() -> Any:
    """Start the mailbox on the driver's node, so that it survives the loss of any other node."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    return _Mailbox.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]  # from ray.remote


@contextmanager
def _delivery(mailbox: Any, display: ProgressDisplay) -> Iterator[None]:
    """Show events as they arrive, from a thread of the driver."""
    done = threading.Event()

    def deliver() -> None:
        while not done.wait(_POLL_SECONDS):
            _show(mailbox, display)

    thread = threading.Thread(target=deliver, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(timeout=10)
        _show(mailbox, display)


def _show(mailbox: Any, display: ProgressDisplay) -> None:
    try:
        events = ray.get(mailbox.take.remote(), timeout=10)
    except RayError:  # a failure of the display must never end a run
        return
    for event in events:
        if event["event"] == "loss":
            _logger.warning("%s", event["text"])
        elif event.get("status") != "failed":  # workers may restart; the driver reports a failed run
            display.consume(event)


class _LossReport(UserCallback):
    """Logs every failure of the workers, in the process that restarts them, and ends the run on a user error."""

    def __init__(self, mailbox: Any, max_failures: int) -> None:
        self._mailbox = mailbox
        self._max_failures = max_failures
        self._failures = 0

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:
        first_error = ray.get(self._mailbox.first_user_error.remote(), timeout=10)
        if first_error:
            raise HyperscaleError(first_error[1])  # an error raised here ends the run; a worker's would restart it
        losses = describe_losses(worker_exceptions)
        self._failures += 1
        if self._failures <= self._max_failures:
            count = f"restart {self._failures} of {self._max_failures}"
            text = f"{losses}; restarting all workers from the last checkpoint ({count})"
            self._mailbox.put.remote({"event": "loss", "text": text})


def describe_losses(worker_exceptions: Mapping[int, Exception]) -> str:
    """Return one line with the failed workers and the reasons, without workers that only lost a peer, if possible."""
    reasons = {rank: _reason(error) for rank, error in sorted(worker_exceptions.items())}
    causes = {rank: reason for rank, reason in reasons.items() if "onnection" not in reason} or reasons
    return "; ".join(f"worker {rank} {reason}" for rank, reason in causes.items())


def _first_line(error: Exception) -> str:
    """Return the first line of Ray's message, or our own if memory ran out: Ray then writes paragraphs."""
    text = str(error).strip()
    if "out of memory" in text.lower() or "OOM" in text:
        return "a worker was killed because memory ran out ('hyperscale plan RECIPE' shows how much a run needs)"
    return f"{type(error).__name__}: {text.splitlines()[0][:300]}" if text else type(error).__name__


def _reason(error: Exception) -> str:
    if isinstance(getattr(error, "health_check_failure", error), RayError):
        return "died (killed, out of memory, or its node is gone)"
    cause = getattr(error, "_base_exc", error)  # Ray Train's wrapper includes the traceback
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"failed: {type(cause).__name__}: {lines[0][:300].rstrip('.') if lines else ''}"


def _fit(recipe: Recipe, mailbox: Any, run: RunIdentity) -> None:
    cluster = recipe.cluster
    storage = open_place(recipe.output).child("ray")
    trainer = TorchTrainer(
        _train_loop,
        train_loop_config={"recipe": dump_recipe(recipe), "mailbox": mailbox, "run": run},
        scaling_config=ScalingConfig(
            num_workers=cluster.workers,
            use_gpu=cluster.gpus_per_worker > 0,
            resources_per_worker=required_resources(cluster.model_copy(update={"workers": 1})),
        ),
        run_config=RunConfig(
            # A new name each time: Ray would resume a run of the same name and train nothing.
            name=f"{recipe.name}-{uuid.uuid4().hex[:8]}",
            storage_path=str(storage),
            failure_config=FailureConfig(max_failures=cluster.max_failures),
            callbacks=[_LossReport(mailbox, cluster.max_failures)],  # type: ignore[list-item]  # Tune's is declared
        ),
        torch_config=TorchConfig(
            backend="nccl" if cluster.gpus_per_worker else "gloo",
            timeout_s=int(60 * recipe.engine.communication_timeout_minutes),
        ),
    )
    with _quiet_train():
        try:
            trainer.fit()
        except (RayError, TrainingFailedError) as error:
            raise _worker_error(error, mailbox, cluster.max_failures) from error
        finally:
            with suppress(OSError):  # it holds only a marker of Ray's
                storage.fs.rm(storage.path, recursive=True)


@contextmanager
def _quiet_train() -> Iterator[None]:
    """Keep Ray Train's own log lines out of the progress display unless something is wrong."""
    logger = logging.getLogger("ray.train")
    before = logger.level
    if not _logger.isEnabledFor(logging.DEBUG):
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def _worker_error(error: Exception, mailbox: Any, max_failures: int) -> HyperscaleError:
    """Return the user's error that a worker reported, or an error about workers that kept failing."""
    try:
        first_error = ray.get(mailbox.first_user_error.remote(), timeout=10)
    except RayError:
        first_error = None
    if first_error:
        return user_error(*first_error)
    failures = getattr(error, "worker_failures", None)
    last_failure = describe_losses(failures) if failures else _first_line(error)
    return ResourceError(
        f"the workers failed more than cluster.max_failures={max_failures} times; the last time {last_failure}. "
        "Continue from the last checkpoint with --resume; --debug shows the traceback"
    )


def _train_loop(config: dict[str, Any]) -> None:
    """Run one worker. Ray calls this in every worker process, and again after a failure."""
    mailbox, context = config["mailbox"], ray.train.get_context()

    def progress(event: dict[str, Any]) -> None:
        mailbox.put.remote(event)

    rank = context.get_world_rank()
    worker = WorkerContext(
        rank=rank,
        world_size=context.get_world_size(),
        local_rank=context.get_local_rank(),
        launcher="ray",
        progress=ignore if rank else progress,
        run=config["run"],
    )
    try:
        train_worker(parse_recipe(config["recipe"], "the recipe"), worker)
    except HyperscaleError as error:
        if not error.is_transient:  # a transient one counts as a lost worker, and Ray restarts the workers
            ray.get(mailbox.report_user_error.remote(type(error).__name__, str(error)))
        raise
