"""Where a run is recorded. `metrics.jsonl` in the run folder is always written and has no switch."""

import os
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self
from urllib.parse import urlsplit

from pydantic import ConfigDict, Field, SerializeAsAny, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from hyperscale.config.plugins import Registry
from hyperscale.config.secrets import MASK, is_masked, without_credentials
from hyperscale.config.section import Section
from hyperscale.errors import ConfigError


class TrackerSettings(Section):
    """The base of every tracker's settings, also for trackers of other packages."""

    package: ClassVar[str] = ""
    """The package that the tracker needs."""

    enabled: bool = False

    def with_secrets(self) -> Self:
        """Return the settings with the secrets that a run folder lacks, taken from the environment.

        Raises:
            ConfigError: a secret is missing; the message names its variable.
        """
        return self

    def secret_variables(self) -> Mapping[str, str]:
        """Return the environment variables from which `with_secrets` reads these secrets in another process."""
        return {}

    def several_nodes_problem(self) -> str | None:
        """Return why the tracker cannot serve a run on several nodes, or None."""
        return None


class MlflowSettings(TrackerSettings):
    """A run in MLflow."""

    package: ClassVar[str] = "mlflow"

    enabled: bool = True
    uri: str | None = None
    """An MLflow server (`http://host:5000`) or database (`sqlite:////absolute/path.db`, `postgresql://…`);
    null = `mlflow.db` beside the run folder. Several nodes need a server or a shared database. `${NAME}` stands for an
    environment variable: `postgresql://mlflow:${MLFLOW_PASSWORD}@host/mlflow`. Run folders hold no password."""
    experiment: str = Field(default="hyperscale", min_length=1, max_length=500)
    run_name: str | None = None
    """null = the recipe's `name`."""
    tags: Mapping[str, str] = {}
    log_system_metrics: bool = False
    """CPU, memory, network and GPU use of rank 0's node."""
    artifacts: bool = True
    """Upload the recipe and the bundles, not only numbers."""

    @field_validator("uri")
    @classmethod
    def _uri_means_the_same_everywhere(cls, uri: str | None) -> str | None:
        if uri is None:
            return None
        parts = urlsplit(uri)
        if parts.scheme in ("", "file"):
            raise ValueError(
                f"'{without_credentials(uri)}' is a folder, and MLflow no longer keeps runs in folders; "
                "use sqlite:////absolute/path/mlflow.db, a server's URL, or null"
            )
        if parts.scheme == "sqlite" and not parts.path.startswith("//"):
            raise ValueError(
                f"'{without_credentials(uri)}' is relative to the folder in which a worker runs; "
                "write sqlite:////absolute/path/mlflow.db (four slashes), or null"
            )
        return uri

    def with_secrets(self) -> Self:
        """Take the URI's password from MLFLOW_TRACKING_URI; a server may have MLFLOW_TRACKING_PASSWORD instead."""
        if self.uri is None or not is_masked(self.uri):
            return self
        known = os.environ.get("MLFLOW_TRACKING_URI", "")
        if without_credentials(known) == self.uri:
            return self.model_copy(update={"uri": known})
        if self.uri.startswith("http") and os.environ.get("MLFLOW_TRACKING_PASSWORD"):
            return self.model_copy(update={"uri": self.uri.replace(f"{MASK}@", "")})
        raise ConfigError(
            f"tracking.mlflow.uri: run folders hold no passwords, so {self.uri} lacks its own. Set MLFLOW_TRACKING_URI "
            "to the whole URI, or give it as tracking.mlflow.uri=… (--uri for `hyperscale track`)"
        )

    def secret_variables(self) -> Mapping[str, str]:
        holds_secret = self.uri is not None and without_credentials(self.uri) != self.uri
        return {"MLFLOW_TRACKING_URI": self.uri} if self.uri and holds_secret else {}

    def several_nodes_problem(self) -> str | None:
        if self.uri is not None and not self.uri.startswith("sqlite:"):
            return None
        return (
            "tracking.mlflow.uri: an SQLite file cannot be written from several nodes. Set it to an MLflow server "
            "(http://host:5000), or set tracking.mlflow.enabled=false"
        )


class WandbSettings(TrackerSettings):
    """A run in Weights & Biases; needs `pip install hypernet-scale[wandb]`. The API key comes from `WANDB_API_KEY`."""

    package: ClassVar[str] = "wandb"

    mode: Literal["online", "offline"] = "online"
    """`offline` writes to a folder, which `wandb sync` uploads later."""
    project: str = Field(default="hyperscale", min_length=1, max_length=128)
    entity: str | None = None
    run_name: str | None = None
    """null = the recipe's `name`."""
    folder: str | None = None
    """An absolute path for W&B's local files; null = `wandb` beside the run folder."""


class ProgressSettings(Section):
    """What the driver's terminal shows."""

    enabled: bool = True
    interval_seconds: float = Field(default=15.0, gt=0)
    """Shortest time between two lines of a job's log (output without a terminal)."""
    every_steps: int | None = Field(default=None, ge=1)
    """In a job's log: steps between two lines, instead of `interval_seconds`."""


TRACKER_SETTINGS: Registry[type[TrackerSettings]] = Registry("tracker", "hyperscale.trackers", {})
"""Settings of the trackers from other packages; `register_tracker` fills it."""


class TrackingSettings(Section):
    """Everything that records or shows the run. A tracker of another package has its settings under its own name."""

    model_config = ConfigDict(extra="allow")

    mlflow: MlflowSettings = MlflowSettings()
    wandb: WandbSettings = WandbSettings()
    progress: ProgressSettings = ProgressSettings()

    __pydantic_extra__: dict[str, SerializeAsAny[Any]]

    @model_validator(mode="after")
    def _others_are_registered(self) -> Self:
        for name, value in (self.model_extra or {}).items():
            settings = TRACKER_SETTINGS.find(name)
            if settings is None:
                known = ", ".join([*type(self).model_fields, *TRACKER_SETTINGS])
                raise PydanticCustomError("unknown_tracker", f"unknown key '{name}'; allowed: {known}")
            try:
                self.__pydantic_extra__[name] = settings.model_validate(value)
            except ValidationError as error:
                first = error.errors()[0]
                path = ".".join(str(part) for part in (name, *first["loc"]))
                raise PydanticCustomError("tracker_settings", f"{path}: {first['msg']}") from error
        return self

    def trackers(self) -> dict[str, TrackerSettings]:
        """Return the settings of every tracker by name, of those not enabled too."""
        values = {name: getattr(self, name) for name in type(self).model_fields} | dict(self.model_extra or {})
        return {name: value for name, value in values.items() if isinstance(value, TrackerSettings)}

    def enabled_trackers(self) -> dict[str, TrackerSettings]:
        """Return the settings of the trackers that record the run."""
        return {name: settings for name, settings in self.trackers().items() if settings.enabled}

    def with_secrets(self) -> Self:
        """Return the settings with the secrets of every enabled tracker; `ConfigError` names one that is missing."""
        return self.model_copy(update={name: one.with_secrets() for name, one in self.enabled_trackers().items()})

    def secret_variables(self) -> dict[str, str]:
        """Return the environment variables that give another process the secrets of every enabled tracker."""
        return {
            name: value for one in self.enabled_trackers().values() for name, value in one.secret_variables().items()
        }
