"""MLflow's timeouts and log levels during a run."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

# MLflow's defaults (120 s, 7 retries) held one call for more than 200 s when its server had been killed.
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
_LEVELS = {
    "alembic": logging.WARNING,
    "mlflow.store.db.utils": logging.WARNING,
    "mlflow.system_metrics.system_metrics_monitor": logging.WARNING,
    "urllib3.connectionpool": logging.ERROR,
}


@contextmanager
def short_timeouts() -> Iterator[None]:
    """Give MLflow short timeouts, unless the user has set them, and silence it and its libraries for the block."""
    added = {key: value for key, value in _ENVIRONMENT.items() if key not in os.environ}
    levels = {name: logging.getLogger(name).level for name in _LEVELS}
    os.environ.update(added)
    for name, level in _LEVELS.items():
        logging.getLogger(name).setLevel(level)
    try:
        yield
    finally:
        for key in added:
            os.environ.pop(key, None)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
