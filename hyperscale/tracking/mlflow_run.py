"""One run in MLflow, as plain blocking calls, and the functions that find or create it."""

import getpass
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from requests.exceptions import RequestException

from hyperscale.config.secrets import with_quoted_credentials, without_credentials
from hyperscale.config.tracking import MlflowSettings
from hyperscale.errors import ConfigError
from hyperscale.places import Place, is_uri, open_place
from hyperscale.tracking.metrics import Point, key_part
from hyperscale.tracking.params import flatten
from hyperscale.tracking.pusher import first_line
from hyperscale.training.callbacks import RunFacts, RunOutcome

# MLflow's own limits (mlflow.utils.validation).
_KEY_LENGTH, _PARAM_LENGTH, _TAG_LENGTH, _DIGEST_LENGTH, _BATCH, _POINTS = 250, 6000, 8000, 36, 100, 1000
_PASSING = ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "RESOURCE_EXHAUSTED")
_STATUS = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}
_MANIFEST = "hyperscale.json"
"""Of a bundle."""
_KEY_TAG = "hyperscale.run_key"
_VARIABLE = re.compile(r"\$\{([A-Za-z_]\w*)\}")


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
        self._logged: dict[str, set[int]] = {}

    def describe(self, facts: RunFacts, tags: Mapping[str, str], artifacts: bool) -> None:
        """Record the parameters, data sets, tags and recipe. May be called again."""
        run_id = self.reference.run_id
        recipe = without_credentials(dict(facts.recipe))
        present = {key[:_KEY_LENGTH]: value[:_PARAM_LENGTH] for key, value in flatten(recipe).items()}
        logged = self._client.get_run(run_id).data.params
        # MLflow's parameters cannot change. A resumed run adds the missing ones, and a tag names the changed ones.
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
        """Record points, in batches of MLflow's size."""
        metrics = [Metric(point.key[:_KEY_LENGTH], point.value, int(point.time * 1000), point.step) for point in points]
        for first in range(0, len(metrics), _POINTS):
            self._client.log_batch(self.reference.run_id, metrics=metrics[first : first + _POINTS])

    def log_missing(self, points: Sequence[Point]) -> int:
        """Record the points that the run lacks, by key and step. Return their number."""
        missing = [point for point in points if point.step not in self._logged_steps(point.key)]
        self.log(missing)
        for point in missing:
            self._logged[point.key].add(point.step)
        return len(missing)

    def tag(self, key: str, value: str) -> None:
        self._client.set_tag(self.reference.run_id, key, value[:_TAG_LENGTH])

    def reopen(self) -> None:
        """Mark a run that was killed or had ended as running."""
        self._client.update_run(self.reference.run_id, status="RUNNING")

    @property
    def status(self) -> str:
        return str(self._client.get_run(self.reference.run_id).info.status)

    def add_file(self, file: Path) -> None:
        self._client.log_artifact(self.reference.run_id, str(file))

    def finish(self) -> None:
        self._client.set_terminated(self.reference.run_id, "FINISHED")

    def close(self, outcome: RunOutcome, artifacts: bool) -> None:
        """Record how the run ended, and its bundles."""
        run_id = self.reference.run_id
        if outcome.message:
            self.tag("hyperscale.message", outcome.message)
        present = {file.path for file in self._client.list_artifacts(run_id, "bundles")} if artifacts else set()
        for task, folder in (outcome.bundles or {}).items():
            place = f"bundles/{key_part(task)}"
            self.tag(f"hyperscale.{place}", folder)
            bundle = open_place(folder)
            if artifacts and bundle.exists() and not (place in present and self._is_same(bundle, place)):
                self._add_folder(bundle, place)
        status = _STATUS[outcome.status]
        if self._client.get_run(run_id).info.status != status:
            self._client.set_terminated(run_id, status)

    def _is_same(self, bundle: Place, place: str) -> bool:
        """Return whether MLflow has this bundle already, by its manifest, which names the digest of every file."""
        manifest = bundle.child(_MANIFEST)
        with tempfile.TemporaryDirectory(prefix="hyperscale-") as scratch:
            try:
                copy = self._client.download_artifacts(self.reference.run_id, f"{place}/{_MANIFEST}", scratch)
            except (MlflowException, OSError):
                return False
            own: bytes = manifest.fs.cat_file(manifest.path)
            return Path(copy).read_bytes() == own

    def _add_folder(self, folder: Place, place: str) -> None:
        if folder.is_local:
            self._client.log_artifacts(self.reference.run_id, str(folder), place)
            return
        with tempfile.TemporaryDirectory(prefix="hyperscale-") as scratch:
            for file in folder.children():
                folder.fs.get_file(file.path, str(Path(scratch) / file.name))
            self._client.log_artifacts(self.reference.run_id, scratch, place)

    def _logged_steps(self, key: str) -> set[int]:
        if key not in self._logged:
            history = self._client.get_metric_history(self.reference.run_id, key)
            self._logged[key] = {metric.step for metric in history}
        return self._logged[key]


def tracking_uri(settings: MlflowSettings, default_root: str) -> str:
    """Return the URI of the recipe with its environment variables, or that of `mlflow.db` in `default_root`.

    A URI from a run folder has no password; `MLFLOW_TRACKING_URI` has it then. User name and password are
    percent-encoded.

    Raises:
        ConfigError: the URI cannot be made; says what to do.
    """
    if settings.uri is None:
        if is_uri(default_root):
            raise ConfigError(
                f"tracking.mlflow.uri=null needs a local run folder, not {default_root}: set it to a server."
            )
        return f"sqlite:///{default_root.rstrip('/')}/mlflow.db"
    return with_quoted_credentials(_VARIABLE.sub(_variable, settings.with_secrets().uri or ""))


def _variable(reference: re.Match[str]) -> str:
    name = reference.group(1)
    if name not in os.environ:
        raise ConfigError(f"tracking.mlflow.uri: the environment variable {name} is not set. Set it on every node.")
    return os.environ[name]


@contextmanager
def clear_errors(uri: str) -> Iterator[None]:
    """Turn every error of MLflow into a `ConfigError` that says what to do."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # noqa: BLE001 - a missing database driver, a damaged file, an absent server, a refused login …
        raise ConfigError(
            f"tracking.mlflow: {without_credentials(uri)} cannot be used ({first_line(error)}). "
            "Start that server, correct tracking.mlflow.uri, or set tracking.mlflow.enabled=false."
        ) from None  # a vendor's text may quote the whole URI


def open_run(settings: MlflowSettings, default_root: str, run_key: str, name: str, run_id: str | None) -> MlflowRun:
    """Find the run by its id or its key, or create it. `ConfigError` says what to do if MLflow cannot be used."""
    uri = tracking_uri(settings, default_root)
    with clear_errors(uri):
        with _database_creation_lock(uri):
            client = MlflowClient(tracking_uri=uri)
            experiment = _experiment(client, settings.experiment, uri)
        run = _find_run(client, experiment, run_key, run_id)
        if run is None:
            tags = {_KEY_TAG: run_key, **_user(), **settings.tags}
            run = client.create_run(experiment, run_name=settings.run_name or name, tags=tags)
    return MlflowRun(client, RunReference(uri, run.info.experiment_id, run.info.run_id))


def find_run(settings: MlflowSettings, default_root: str, run_key: str) -> MlflowRun | None:
    """Return the run with a key if MLflow has it."""
    uri = tracking_uri(settings, default_root)
    with clear_errors(uri):
        client = MlflowClient(tracking_uri=uri)
        run = _find_run(client, _experiment(client, settings.experiment, uri), run_key, None)
    return MlflowRun(client, RunReference(uri, run.info.experiment_id, run.info.run_id)) if run else None


def absent_run(settings: MlflowSettings, default_root: str, run_id: str) -> MlflowRun:
    """Return a run by its id without asking its server."""
    uri = tracking_uri(settings, default_root)
    return MlflowRun(MlflowClient(tracking_uri=uri), RunReference(uri, None, run_id))


@contextmanager
def _database_creation_lock(uri: str) -> Iterator[None]:
    """Let one process at a time create a database file. MLflow writes its tables in many steps, without a lock."""
    if not uri.startswith("sqlite:///"):
        yield
        return
    database = Path(uri.removeprefix("sqlite:///"))
    database.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(database.with_name(f".{database.name}.lock"))
    with suppress(OSError):  # a file system without locks
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _experiment(client: MlflowClient, name: str, uri: str) -> str:
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        # Without a server MLflow would put artifacts into ./mlruns, wherever this process runs.
        root = Path(uri.removeprefix("sqlite:///")).parent if uri.startswith("sqlite:///") else None
        location = (root / "mlartifacts" / key_part(name)).as_uri() if root else None
        try:
            return str(client.create_experiment(name, artifact_location=location))
        except MlflowException:
            experiment = client.get_experiment_by_name(name)  # another run has just created it
            if experiment is None:
                raise
    if experiment.lifecycle_stage != "active":
        raise ConfigError(
            f"tracking.mlflow.experiment: '{name}' was deleted in MLflow. Restore it there, or choose another name."
        )
    return str(experiment.experiment_id)


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
    runs = client.search_runs([experiment], f"tags.`{_KEY_TAG}` = '{run_key}'", max_results=1)
    return runs[0] if runs else None


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


def is_temporary(error: Exception) -> bool:
    """Return whether the server may accept the same request later."""
    if isinstance(error, MlflowException):
        return error.error_code in _PASSING
    return isinstance(error, RequestException)
