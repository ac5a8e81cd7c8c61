"""The package's logger: one line a message, to standard error, silent below WARNING unless asked."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_FORMAT = "%(asctime)s %(levelname).1s %(message)s"


def get_logger(name: str) -> logging.Logger:
    """Return the logger of one module; `name` is its `__name__`."""
    return logging.getLogger(name)


def set_up_logging(level: str | None = None, rank: int = 0) -> None:
    """Send our messages to standard error.

    Rank 0 logs at `level` (default: `HYPERSCALE_LOG`, else INFO), other ranks at ERROR, so each event is logged once.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its advice is for developers
    root = logging.getLogger("hyperscale")
    level_name = (level or os.environ.get("HYPERSCALE_LOG", "INFO")).upper()
    root.setLevel(level_name if rank == 0 else max(logging.ERROR, logging.getLevelNamesMapping().get(level_name, 20)))
    if not root.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter(_FORMAT, datefmt="%H:%M:%S"))
        root.addHandler(handler)
        root.propagate = False


@contextmanager
def quiet(name: str) -> Iterator[None]:
    """Let a logger, and those below it, log errors only."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
