"""The run in MLflow. The only file that knows it.

Set-up may fail and says how to mend it; after that nothing raises and nothing waits: all calls go through an `Outbox`.
"""

import fcntl
import getpass
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from requests.exceptions import RequestException

from hyperscale.config.secrets import without_credentials
from hyperscale.config.tracking import MlflowSettings
from hyperscale.errors import ConfigError
from hyperscale.logger import get_logger
from hyperscale.tracking.jsonl import read_entries, recorded_points
from hyperscale.tracking.metrics import Point, evaluation_metrics, key_part, points, run_metrics, step_metrics
from hyperscale.tracking.mlflow_timeouts import short_timeouts
from hyperscale.tracking.outbox import Outbox
from hyperscale.tracking.params import flatten
from hyperscale.training.callbacks import CheckpointRecord, EvaluationRecord, RunFacts, RunOutcome, StepRecord

# MLflow's own limits (mlflow.utils.validation).
_KEY_LENGTH, _PARAM_LENGTH, _TAG_LENGTH, _DIGEST_LENGTH, _BATCH, _POINTS = 250, 6000, 8000, 36, 100, 1000
_PASSING = ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "RESOURCE_EXHAUSTED")
_STATUS = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}
_KEY_TAG = "hyperscale.run_key"
_PATIENCE_SECONDS, _LIMIT_SECONDS = 10.0, 300.0
_log = get_logger(__name__)


@dataclass(frozen=True)
class RunReference:
    """Where to find the run in MLflow."""

    uri: str
    experiment_id: str | None
    """None if a resumed run could not ask its server."""
    run_id: str


class MlflowRun:
    """One run in MLflow, as plain blocking calls that may raise."""

    def __init__(self, client: MlflowClient, reference: RunReference) -> None:
        self._client = client
        self.reference = reference

    def describe(self, facts: RunFacts, tags: Mapping[str, str], artifacts: bool) -> None:
        """Record what is known at the start: parameters, data sets, tags, recipe. May be repeated."""
        run_id = self.reference.run_id
        recipe = without_credentials(dict(facts.recipe))
        present = {key[:_KEY_LENGTH]: value[:_PARAM_LENGTH] for key, value in flatten(recipe).items()}
        logged = self._client.get_run(run_id).data.params
        # Parameters are immutable: a resumed run adds what is missing and tells the rest in a tag.
        missing = [Param(key, value) for key, value in present.items() if key not in logged]
        changed = [f"{key}={value}" for key, value in present.items() if logged.get(key, value) != value]
        all_tags = {"hyperscale.folder": facts.folder, "hyperscale.world_size": str(facts.world_size), **tags}
        if changed:
            all_tags[f"hyperscale.changed_at_step_{facts.start_step}"] = ", ".join(changed)
        for first in range(0, len(missing), _BATCH):
            self._client.log_batch(run_id, params=missing[first : first + _BATCH])
        self._client.log_batch(run_id, tags=[RunTag(key, value[:_TAG_LENGTH]) for key, value in all_tags.items()])
        if facts.datasets:
            self._client.log_inputs(run_id, [_dataset_input(name, about) for name, about in facts.datasets.items()])
        if artifacts:
            self._client.log_dict(run_id, recipe, "recipe.yaml")

    def log(self, points: Sequence[Point]) -> None:
        """Record up to 1000 points."""
        metrics = [Metric(point.key[:_KEY_LENGTH], point.value, int(point.time * 1000), point.step) for point in points]
        self._client.log_batch(self.reference.run_id, metrics=metrics)

    def log_missing(self, points: Sequence[Point]) -> int:
        """Record the points of whose key and step the run has no value yet; return how many there were."""
        logged = {key: self._logged_steps(key) for key in {point.key for point in points}}
        missing = [point for point in points if point.step not in logged[point.key]]
        for first in range(0, len(missing), _POINTS):
            self.log(missing[first : first + _POINTS])
        return len(missing)

    def tag(self, key: str, value: str) -> None:
        self._client.set_tag(self.reference.run_id, key, value[:_TAG_LENGTH])

    def reopen(self) -> None:
        """Mark a run that was killed or had ended as running."""
        self._client.update_run(self.reference.run_id, status="RUNNING")

    def close(self, outcome: RunOutcome, artifacts: bool) -> None:
        """Record how the run ended, and its bundles."""
        run_id = self.reference.run_id
        if outcome.message:
            self.tag("hyperscale.message", outcome.message)
        present = {file.path for file in self._client.list_artifacts(run_id, "bundles")} if artifacts else set()
        for task, folder in (outcome.bundles or {}).items():
            place = f"bundles/{key_part(task)}"
            self.tag(f"hyperscale.{place}", folder)
            if artifacts and Path(folder).is_dir() and place not in present:
                self._client.log_artifacts(run_id, folder, place)
        status = _STATUS[outcome.status]
        if self._client.get_run(run_id).info.status != status:
            self._client.set_terminated(run_id, status)

    def _logged_steps(self, key: str) -> set[int]:
        return {metric.step for metric in self._client.get_metric_history(self.reference.run_id, key)}


def tracking_uri(settings: MlflowSettings, default_root: str) -> str:
    """Return the URI of the recipe, or that of `mlflow.db` in `default_root`, an absolute local path."""
    if settings.uri is not None:
        return settings.uri
    if not Path(default_root).is_absolute():
        raise ConfigError(f"tracking.mlflow.uri=null needs a local run folder, not {default_root}: set it to a server.")
    return f"sqlite:///{default_root.rstrip('/')}/mlflow.db"


@contextmanager
def clear_errors(uri: str) -> Iterator[None]:
    """Turn whatever MLflow raises into a `ConfigError` that says what to do."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # a missing database driver, a damaged file, an absent server, a refused login …
        reason = (str(error).splitlines() or [""])[0][:300]
        raise ConfigError(
            f"tracking.mlflow: {without_credentials(uri)} cannot be used ({reason}). "
            "Start that server, correct tracking.mlflow.uri, or set tracking.mlflow.enabled=false."
        ) from error


def open_run(settings: MlflowSettings, default_root: str, run_key: str, name: str, run_id: str | None) -> MlflowRun:
    """Find the run by its id or its key, or create it. `ConfigError` says what to do if MLflow cannot be used."""
    uri = tracking_uri(settings, default_root)
    with clear_errors(uri):
        with _database_creation_lock(uri):
            client = MlflowClient(tracking_uri=uri)
            experiment = _experiment(client, settings.experiment, uri)
        found = _find_run(client, experiment, run_key, run_id)
        if found is None:
            tags = {_KEY_TAG: run_key, **_user(), **settings.tags}
            found = client.create_run(experiment, run_name=settings.run_name or name, tags=tags)
    return MlflowRun(client, RunReference(uri, found.info.experiment_id, found.info.run_id))


class MlflowTracker:
    """Records the run in MLflow, resuming the same run after a restart.

    `default_root` holds `mlflow.db` if the recipe names no server; `run_key` identifies the run over all its restarts
    (the driver makes one per run, and a checkpoint's `run_key` goes before it); `tags` are added as they are.
    """

    def __init__(self, settings: MlflowSettings, default_root: str, run_key: str, tags: Mapping[str, str]) -> None:
        self._settings = settings
        self._default_root = default_root
        self._run_key = run_key
        self._tags = dict(tags)
        self._cleanup = ExitStack()
        self._run: MlflowRun | None = None
        self._outbox: Outbox[Point] | None = None
        self._monitor: Any = None
        self._folder = ""

    @property
    def reference(self) -> RunReference | None:
        """Where the run is, once it has started."""
        return self._run.reference if self._run else None

    def on_run_start(self, facts: RunFacts) -> None:
        """Open the run; `ConfigError` if that fails, except on a resume, which no server shall prevent."""
        self._run_key = facts.tracking_state.get("run_key", self._run_key)
        self._folder = facts.folder
        with ExitStack() as stack:
            stack.enter_context(short_timeouts())
            self._run = run = self._open(facts)
            self._cleanup = stack.pop_all()
        recipient = f"MLflow at {without_credentials(run.reference.uri)}"
        self._outbox = Outbox(run.log, is_temporary=_is_temporary, recipient=recipient)
        self._outbox.call(run.reopen)
        self._outbox.call(lambda: run.describe(facts, self._tags, self._settings.artifacts))
        self._put(run_metrics(facts), facts.start_step)
        if facts.start_step > 0:
            self._outbox.call(lambda: self._send_missing(run, facts))
        if self._settings.log_system_metrics:
            self._outbox.call(self._start_monitor)

    def on_step(self, record: StepRecord) -> None:
        self._put(step_metrics(record), record.step)

    def on_evaluation(self, record: EvaluationRecord) -> None:
        self._put(evaluation_metrics(record), record.step)

    def on_checkpoint(self, record: CheckpointRecord) -> None:
        if self._run and self._outbox:
            run = self._run
            self._outbox.call(lambda: run.tag("hyperscale.checkpoint", record.path))

    def on_run_end(self, outcome: RunOutcome) -> None:
        """Send what is left, within a limit; how that goes never decides how the run ended."""
        if self._run and self._outbox:
            run, artifacts = self._run, self._settings.artifacts
            self._outbox.call(self._stop_monitor)
            self._outbox.call(lambda: run.close(outcome, artifacts))
            num_lost = self._outbox.close(_PATIENCE_SECONDS, _LIMIT_SECONDS)
            if num_lost:
                command = f"hyperscale track {self._folder}"
                _log.warning("%d records did not reach MLflow; send them once it answers: %s", num_lost, command)
        self._outbox = None
        self._cleanup.close()

    def state(self) -> Mapping[str, Any]:
        if self._run is None:
            return {"run_key": self._run_key}
        reference = self._run.reference
        return {
            "run_key": self._run_key,
            "mlflow_run_id": reference.run_id,
            "mlflow_experiment_id": reference.experiment_id,
            "mlflow_uri": without_credentials(reference.uri),
        }

    def _put(self, values: Mapping[str, float], step: int) -> None:
        if self._outbox:
            self._outbox.put(points(values, step, time.time()))

    def _send_missing(self, run: MlflowRun, facts: RunFacts) -> None:
        """Send what the JSONL mirror has of the steps before a restart: a killed process takes its outbox with it."""
        with suppress(FileNotFoundError):
            run.log_missing(
                recorded_points(entry for entry in read_entries(facts.folder) if entry.step <= facts.start_step)
            )

    def _open(self, facts: RunFacts) -> MlflowRun:
        run_id = facts.tracking_state.get("mlflow_run_id")
        try:
            return open_run(self._settings, self._default_root, self._run_key, facts.name, run_id)
        except ConfigError as error:
            uri = tracking_uri(self._settings, self._default_root)
            if run_id is None or not uri.startswith("http"):
                raise
            _log.warning("%s The resumed run goes on meanwhile and sends its records when it answers.", error)
            return MlflowRun(MlflowClient(tracking_uri=uri), RunReference(uri, None, run_id))

    def _start_monitor(self) -> None:
        if self._run:
            reference = self._run.reference
            self._monitor = SystemMetricsMonitor(  # type: ignore[no-untyped-call]
                reference.run_id, resume_logging=True, tracking_uri=reference.uri
            )
            self._monitor.start()

    def _stop_monitor(self) -> None:
        if self._monitor:
            self._monitor.finish()


def record_end(settings: MlflowSettings, default_root: str, run_key: str, outcome: RunOutcome) -> None:
    """Say how a run ended whose rank 0 was killed before it could; for the driver. Warns if that fails."""
    uri = tracking_uri(settings, default_root)
    try:
        with short_timeouts(), clear_errors(uri):
            client = MlflowClient(tracking_uri=uri)
            found = _find_run(client, _experiment(client, settings.experiment, uri), run_key, None)
            if found is not None and found.info.status == "RUNNING":
                reference = RunReference(uri, found.info.experiment_id, found.info.run_id)
                MlflowRun(client, reference).close(outcome, settings.artifacts)
    except ConfigError as error:
        _log.warning("MLflow could not be told that the run has %s. %s", outcome.status, error)


def record_comparison(
    settings: MlflowSettings, default_root: str, name: str, metrics: Mapping[str, float], files: Sequence[Path]
) -> None:
    """Record a comparison as a run of its own, with its table as artifacts. Warns if that fails."""
    uri = tracking_uri(settings, default_root)
    try:
        with short_timeouts(), clear_errors(uri):
            run = open_run(settings, default_root, f"comparison-{name}-{time.time_ns()}", name, None)
            client, run_id = MlflowClient(tracking_uri=uri), run.reference.run_id
            run.log(points(metrics, 0, time.time()))
            for file in files:
                client.log_artifact(run_id, str(file))
            client.set_terminated(run_id, "FINISHED")
    except ConfigError as error:
        _log.warning("MLflow could not be told of the comparison. %s", error)


@contextmanager
def _database_creation_lock(uri: str) -> Iterator[None]:
    """Let one process at a time create a database file: MLflow writes its tables in many steps and locks nothing."""
    if not uri.startswith("sqlite:///"):
        yield
        return
    folder = Path(uri.removeprefix("sqlite:///")).parent
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _experiment(client: MlflowClient, name: str, uri: str) -> str:
    found = client.get_experiment_by_name(name)
    if found is None:
        # Without a server MLflow would put artifacts into ./mlruns, wherever this process runs.
        root = Path(uri.removeprefix("sqlite:///")).parent if uri.startswith("sqlite:///") else None
        location = (root / "mlartifacts" / key_part(name)).as_uri() if root else None
        try:
            return str(client.create_experiment(name, artifact_location=location))
        except MlflowException:
            found = client.get_experiment_by_name(name)  # another run created it in this moment
            if found is None:
                raise
    if found.lifecycle_stage != "active":
        raise ConfigError(
            f"tracking.mlflow.experiment: '{name}' was deleted in MLflow. Restore it there, or choose another name."
        )
    return str(found.experiment_id)


def _find_run(client: MlflowClient, experiment: str, run_key: str, run_id: str | None) -> Any:
    if run_id is not None:
        try:
            run = client.get_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
        else:
            if run.info.lifecycle_stage == "active":
                return run
    found = client.search_runs([experiment], f"tags.`{_KEY_TAG}` = '{run_key}'", max_results=1)
    return found[0] if found else None


def _dataset_input(name: str, about: Mapping[str, Any]) -> DatasetInput:
    rows = {key: value for key, value in about.items() if key not in ("source", "digest")}
    dataset = Dataset(
        name=name,
        digest=str(about.get("digest", ""))[:_DIGEST_LENGTH],
        source_type="hyperscale",
        source=_json({"source": about.get("source"), "digest": about.get("digest")}),
        profile=_json(rows),
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _user() -> dict[str, str]:
    try:
        return {"mlflow.user": getpass.getuser(), "mlflow.source.name": "hyperscale"}
    except (KeyError, OSError):  # a container's user without a name
        return {"mlflow.source.name": "hyperscale"}


def _is_temporary(error: Exception) -> bool:
    """Tell a server that is away for a while from a request that it will never take."""
    if isinstance(error, MlflowException):
        return error.error_code in _PASSING
    return isinstance(error, RequestException)
