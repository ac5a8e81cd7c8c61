"""The tracker for MLflow. This file and mlflow_run.py are the only ones that know it."""

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

from hyperscale.config.secrets import without_credentials
from hyperscale.config.tracking import MlflowSettings
from hyperscale.errors import ConfigError
from hyperscale.logger import get_logger
from hyperscale.tracking.jsonl import Entry, recorded_points
from hyperscale.tracking.metrics import points
from hyperscale.tracking.mlflow_run import (
    MlflowRun,
    absent_run,
    clear_errors,
    find_run,
    is_temporary,
    open_run,
    tracking_uri,
)
from hyperscale.tracking.mlflow_timeouts import short_timeouts
from hyperscale.training.callbacks import CheckpointRecord, RunFacts, RunOutcome

_COMMIT_TAG = "mlflow.source.git.commit"
_SQLITE = "sqlite:///"
_log = get_logger(__name__)


class MlflowTracker:
    """Records the run in MLflow; a `Tracker`. `default_root` holds `mlflow.db` if the recipe names no server."""

    def __init__(self, settings: MlflowSettings, default_root: str, tags: Mapping[str, str]) -> None:
        self._settings = settings
        self._default_root = default_root
        self._tags = {_COMMIT_TAG if key == "git_commit" else key: value for key, value in tags.items()}
        self._cleanup = ExitStack()
        self._run: MlflowRun | None = None
        self._live = False
        self._monitor: Any = None

    def open(self, facts: RunFacts, run_key: str, live: bool) -> None:
        """Open the run. `ConfigError` if that fails; a resumed run starts although its server does not answer."""
        self._live = live
        with ExitStack() as stack:
            stack.enter_context(short_timeouts())
            self._run = self._open(facts, run_key)
            self._cleanup = stack.pop_all()

    def push(self, entries: Sequence[Entry], may_be_there: bool) -> int:
        run = self._opened()
        for facts in (entry.record for entry in entries if isinstance(entry.record, RunFacts)):
            self._start(run, facts)
        values = recorded_points(entries)
        if may_be_there:
            num_sent = run.log_missing(values)
        else:
            run.log(values)
            num_sent = len(values)
        checkpoints = [entry.record for entry in entries if isinstance(entry.record, CheckpointRecord)]
        if checkpoints:
            run.tag("hyperscale.checkpoint", checkpoints[-1].path)
        if isinstance(entries[-1].record, RunOutcome):
            self._stop_monitor()
            run.close(entries[-1].record, self._settings.artifacts)
        return num_sent

    def is_temporary(self, error: Exception) -> bool:
        return is_temporary(error)

    def state(self) -> Mapping[str, str]:
        reference = self._opened().reference
        uri = str(without_credentials(reference.uri))
        place = {"uri": uri, "experiment_id": reference.experiment_id or "", "run_id": reference.run_id}
        return place | {"title": "MLflow"} | _shown(uri, reference.experiment_id, reference.run_id)

    def close(self) -> None:
        self._stop_monitor()
        self._cleanup.close()

    def record_end(self, run_key: str, outcome: RunOutcome) -> None:
        with short_timeouts(), clear_errors(tracking_uri(self._settings, self._default_root)):
            run = find_run(self._settings, self._default_root, run_key)
            if run is not None and run.status == "RUNNING":
                run.close(outcome, self._settings.artifacts)

    def record_comparison(self, name: str, metrics: Mapping[str, float], files: Sequence[Path]) -> None:
        with short_timeouts(), clear_errors(tracking_uri(self._settings, self._default_root)):
            run = open_run(self._settings, self._default_root, f"comparison-{name}-{time.time_ns()}", name, None)
            run.log(points(metrics, 0, time.time()))
            for file in files:
                run.add_file(file)
            run.finish()

    def _opened(self) -> MlflowRun:
        if self._run is None:
            raise RuntimeError("the tracker is not open")
        return self._run

    def _open(self, facts: RunFacts, run_key: str) -> MlflowRun:
        run_id = _known_run(facts.tracking_state)
        try:
            return open_run(self._settings, self._default_root, run_key, facts.name, run_id)
        except ConfigError as error:
            uri = tracking_uri(self._settings, self._default_root)
            if not self._live or run_id is None or not uri.startswith("http"):
                raise
            _log.warning("%s The resumed run goes on and sends its records when the server answers.", error)
            return absent_run(self._settings, self._default_root, run_id)

    def _start(self, run: MlflowRun, facts: RunFacts) -> None:
        run.reopen()
        run.describe(facts, self._tags, self._settings.artifacts)
        if self._live and self._settings.log_system_metrics and self._monitor is None:
            reference = run.reference
            self._monitor = SystemMetricsMonitor(  # type: ignore[no-untyped-call]
                reference.run_id, resume_logging=True, tracking_uri=reference.uri
            )
            self._monitor.start()

    def _stop_monitor(self) -> None:
        if self._monitor is not None:
            self._monitor.finish()
            self._monitor = None


def _known_run(state: Mapping[str, Any]) -> str | None:
    """Return the run's id from a checkpoint; those from before the table of trackers have flat keys."""
    place = state.get("mlflow", {})
    run_id = place.get("run_id") or state.get("mlflow_run_id")
    return str(run_id) if run_id else None


def _shown(uri: str, experiment_id: str | None, run_id: str) -> dict[str, str]:
    if uri.startswith("http"):
        return {"where": f"{uri.rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}", "command": ""}
    where = uri.removeprefix(_SQLITE)
    return {"where": f"{run_id} in {where}", "command": f"mlflow ui --backend-store-uri {uri}"}
