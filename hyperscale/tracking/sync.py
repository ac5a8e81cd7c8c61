"""Bring MLflow up to date with a run folder's JSONL: after its server was away, or to copy a run to another one."""

from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from hyperscale.config.tracking import MlflowSettings
from hyperscale.errors import ConfigError, RunFolderError
from hyperscale.tracking.jsonl import METRICS_FILE, Entry, read_entries, recorded_points
from hyperscale.tracking.mlflow import RunReference, clear_errors, open_run, tracking_uri
from hyperscale.tracking.mlflow_timeouts import short_timeouts
from hyperscale.tracking.places import mlflow_place
from hyperscale.training.callbacks import RunFacts, RunOutcome


@dataclass(frozen=True)
class SyncReport:
    """What a sync did."""

    reference: RunReference
    num_sent: int
    num_present: int
    """Points that MLflow had already."""


def sync_run(folder: str, uri: str | None = None) -> str:
    """Send MLflow what it lacks of a run, to `uri` or where the run's recipe says; return what was done, in a line."""
    root = folder if "://" in folder else str(Path(folder).resolve())
    recipe = _last_start(root, _read(root))[0].recipe
    settings = dict(recipe.get("tracking", {}).get("mlflow", {}))
    try:
        chosen = MlflowSettings.model_validate(settings | ({"uri": uri} if uri else {}))
    except ValidationError as error:
        raise ConfigError(f"tracking.mlflow: {error.errors()[0]['msg']}") from error
    report = sync_to_mlflow(root, chosen, root.rstrip("/").rpartition("/")[0])
    place = mlflow_place(report.reference.uri, report.reference.experiment_id, report.reference.run_id)
    return f"sent {report.num_sent} values, {report.num_present} were there: {place}"


def sync_to_mlflow(folder: str, settings: MlflowSettings, default_root: str) -> SyncReport:
    """Send MLflow what it lacks of a run; doing it again sends nothing.

    The run is found by its key and created if MLflow does not know it. `RunFolderError` if the folder holds no record,
    `ConfigError` if MLflow cannot be used.
    """
    entries = _read(folder)
    facts, run_key = _last_start(folder, entries)
    uri = tracking_uri(settings, default_root)
    with short_timeouts(), clear_errors(uri):
        run = open_run(settings, default_root, run_key, facts.name, facts.tracking_state.get("mlflow_run_id"))
        run.describe(facts, {}, settings.artifacts)
        all_points = recorded_points(entries)
        num_sent = run.log_missing(all_points)
        if isinstance(entries[-1].record, RunOutcome):
            run.close(entries[-1].record, settings.artifacts)
    return SyncReport(run.reference, num_sent, len(all_points) - num_sent)


def _read(folder: str) -> list[Entry]:
    try:
        return list(read_entries(folder))
    except OSError as error:
        raise RunFolderError(f"{folder} holds no {METRICS_FILE}: give the folder of a run ({error}).") from error


def _last_start(folder: str, entries: list[Entry]) -> tuple[RunFacts, str]:
    for entry in reversed(entries):
        if isinstance(entry.record, RunFacts) and entry.run_key is not None:
            return entry.record, entry.run_key
    raise RunFolderError(f"{folder}/{METRICS_FILE} does not tell which run it records: its first line is missing.")
