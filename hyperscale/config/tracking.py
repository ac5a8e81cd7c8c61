"""Who is told about the run. The JSONL mirror in the run folder is always written and has no switch."""

from collections.abc import Mapping
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from hyperscale.config.section import Section


class MlflowSettings(Section):
    """Where the run is recorded for comparison."""

    enabled: bool = True
    uri: str | None = None
    """An MLflow server (`http://host:5000`) or database (`sqlite:////absolute/path.db`, `postgresql://…`);
    null = `mlflow.db` beside the run folder. Several nodes need a server or a shared database."""
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
                f"'{uri}' is a folder, and MLflow no longer keeps runs in folders; "
                "use sqlite:////absolute/path/mlflow.db, a server's URL, or null"
            )
        if parts.scheme == "sqlite" and not parts.path.startswith("//"):
            raise ValueError(
                f"'{uri}' is relative to whatever folder a worker happens to run in; "
                "write sqlite:////absolute/path/mlflow.db (four slashes), or null"
            )
        return uri


class ProgressSettings(Section):
    """What the driver's terminal shows."""

    enabled: bool = True
    interval_seconds: float = Field(default=15.0, gt=0)
    """Without a terminal (a job's log): at least so much time between two lines."""
    every_steps: int | None = Field(default=None, ge=1)
    """Without a terminal: a line every so many steps instead."""


class TrackingSettings(Section):
    """Everything that listens to the run."""

    mlflow: MlflowSettings = MlflowSettings()
    progress: ProgressSettings = ProgressSettings()
