"""The table of trackers, and what a run does with all of them. A tracker is one row and one module.

A `Pusher` feeds each tracker from the run's `metrics.jsonl`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from hyperscale.config.plugins import Registry, import_object
from hyperscale.config.tracking import TRACKER_SETTINGS, TrackerSettings, TrackingSettings
from hyperscale.errors import ConfigError, HyperscaleError, PluginError, RunFolderError, nearest
from hyperscale.logger import get_logger
from hyperscale.places import open_place
from hyperscale.tracking.jsonl import METRICS_FILE, Entry, JsonlTracker, read_entries
from hyperscale.tracking.pusher import Pusher, first_line
from hyperscale.tracking.tracker import Tracker
from hyperscale.training.callbacks import Callback, RunFacts, RunOutcome

_TRACKERS = {
    "mlflow": "hyperscale.tracking.mlflow:MlflowTracker",
    "wandb": "hyperscale.tracking.wandb:WandbTracker",
}
TRACKERS: Registry[str] = Registry("tracker", "hyperscale.trackers", _TRACKERS)
"""Name under `tracking` -> import path of the class, which is imported when a run uses it."""
_BATCH = 1000
_log = get_logger(__name__)


def register_tracker(name: str, path: str, settings: type[TrackerSettings]) -> None:
    """Add a tracker of another package; its settings lie under `tracking.<name>`.

    Args:
        path: `package.module:Class`; the class follows `hyperscale.tracking.tracker.Tracker`.

    Raises:
        PluginError: the name is taken.
    """
    if name in TrackingSettings.model_fields:
        raise PluginError(f"tracker '{name}' is registered already; choose another name")
    TRACKERS.register(name, path)
    TRACKER_SETTINGS.register(name, settings)


def open_trackers(
    settings: TrackingSettings, folder: str, root: str, run_key: str, tags: Mapping[str, str]
) -> list[Callback]:
    """Return the listeners that record a run: first the writer of its file, then one per tracker.

    Args:
        root: the folder that holds the run folder.
        tags: recorded as they are; `git_commit` is known to trackers.
    """
    journal = JsonlTracker(folder, run_key)
    pushers = [
        Pusher(name, _create(name, tracker, root, tags), journal)
        for name, tracker in settings.enabled_trackers().items()
    ]
    return [journal, *pushers]


def record_end(settings: TrackingSettings, root: str, run_key: str, outcome: RunOutcome) -> None:
    """Record the end of a run whose rank 0 was killed. The driver calls this. Warns if it fails."""
    for name, tracker in settings.enabled_trackers().items():
        try:
            _create(name, tracker, root, {}).record_end(run_key, outcome)
        except Exception as error:  # noqa: BLE001 - a vendor's failure must not hide the run's own
            _log.warning("%s could not record that the run has %s: %s", name, outcome.status, first_line(error))


def record_comparison(
    settings: TrackingSettings, root: str, name: str, metrics: Mapping[str, float], files: Sequence[Path]
) -> None:
    """Record a comparison in every tracker, with its table. Warns if that fails."""
    for tracker_name, tracker in settings.enabled_trackers().items():
        try:
            _create(tracker_name, tracker, root, {}).record_comparison(name, metrics, files)
        except Exception as error:  # noqa: BLE001 - the comparison itself has succeeded
            _log.warning("%s could not record the comparison: %s", tracker_name, first_line(error))


def needed_packages() -> dict[str, str]:
    """Return package -> setting that needs it, for the packages that a recipe needs by default."""
    enabled = TrackingSettings().enabled_trackers()
    return {tracker.package: f"tracking.{name}.enabled=true" for name, tracker in enabled.items() if tracker.package}


def several_nodes_problem(settings: TrackingSettings) -> str | None:
    """Return why a tracker cannot serve a run on several nodes, or None."""
    problems = (tracker.several_nodes_problem() for tracker in settings.enabled_trackers().values())
    return next((problem for problem in problems if problem), None)


def tracked_places(state: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Return tracker -> where the run is, from what the trackers keep in a checkpoint."""
    return {name: dict(place) for name, place in state.items() if isinstance(place, Mapping)}


def places_of_old_result(values: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Return the places in an earlier version's `result.json`, which recorded MLflow only."""
    if not values:
        return {}
    uri, experiment, run_id = (str(values.get(f"mlflow_{key}", "")) for key in ("uri", "experiment_id", "run_id"))
    from_server = f"{uri.rstrip('/')}/#/experiments/{experiment}/runs/{run_id}"
    where = from_server if uri.startswith("http") else f"{run_id} in {uri}"
    known = {"uri": uri, "experiment_id": experiment, "run_id": run_id}
    return {"mlflow": known | {"title": "MLflow", "where": where, "command": ""}}


def track(folder: str, to: str | None = None, uri: str | None = None) -> list[str]:
    """Send each tracker the records of a run that it lacks, and return a line per tracker. A second call sends nothing.

    Args:
        to: one tracker; by default those that the run's recipe enables.
        uri: another place than the recipe's, for trackers that have a `uri`.

    Raises:
        RunFolderError: the folder holds no record of a run.
        ConfigError: a tracker cannot be used.
    """
    place = open_place(folder)
    entries = _read(str(place))
    facts, run_key = _last_start(str(place), entries)
    recorded = dict(facts.recipe.get("tracking", {}))
    names = [to] if to else list(_settings_of(recorded).enabled_trackers())
    if not names:
        raise ConfigError(f"{folder}: the run's recipe enables no tracker; name one with --to")
    lines = []
    for name in names:
        if TRACKERS.find(name) is None:
            raise ConfigError(f"no tracker '{name}'; known are {', '.join(TRACKERS)}." + nearest(name, list(TRACKERS)))
        changes: dict[str, Any] = {"enabled": True} | ({"uri": uri} if uri else {})
        settings = _settings_of(recorded | {name: dict(recorded.get(name, {})) | changes}).trackers()[name]
        lines.append(_push_all(name, _create(name, settings, str(place.parent), {}), entries, facts, run_key))
    return lines


def _push_all(name: str, tracker: Tracker, entries: Sequence[Entry], facts: RunFacts, run_key: str) -> str:
    tracker.open(facts, run_key, live=False)
    try:
        batches = [entries[first : first + _BATCH] for first in range(0, len(entries), _BATCH)]
        num_sent = sum(tracker.push(batch, may_be_there=True) for batch in batches)
        return f"{name}: sent {num_sent} values: {tracker.state().get('where', '')}"
    except HyperscaleError:
        raise
    except Exception as error:  # noqa: BLE001 - vendors raise what they like
        raise ConfigError(f"{name} did not take all records ({first_line(error)}). Run the command again.") from None
    finally:
        tracker.close()


def _create(name: str, settings: TrackerSettings, root: str, tags: Mapping[str, str]) -> Tracker:
    path = TRACKERS.find(name)
    if path is None:
        raise ConfigError(f"no tracker '{name}'; known are {', '.join(TRACKERS)}")
    try:
        tracker: Tracker = import_object(path)(settings, root, tags)
    except PluginError as error:
        package = settings.package or name
        raise ConfigError(
            f"tracking.{name}: {error}. Install it (pip install {package}), or set tracking.{name}.enabled=false"
        ) from error
    return tracker


def _settings_of(recorded: Mapping[str, Any]) -> TrackingSettings:
    try:
        return TrackingSettings.model_validate(recorded)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(part) for part in ("tracking", *first["loc"]))
        raise ConfigError(f"{path}: {first['msg']}") from None


def _read(folder: str) -> list[Entry]:
    try:
        return list(read_entries(folder))
    except OSError as error:
        raise RunFolderError(f"{folder} holds no {METRICS_FILE}: give the folder of a run ({error}).") from error


def _last_start(folder: str, entries: Sequence[Entry]) -> tuple[RunFacts, str]:
    for entry in reversed(entries):
        if isinstance(entry.record, RunFacts) and entry.run_key is not None:
            return entry.record, entry.run_key
    raise RunFolderError(f"{folder}/{METRICS_FILE} does not say which run it records: its first line is missing.")
