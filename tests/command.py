"""The command line as a test runs it: in this process, its output and exit code kept."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from hyperscale.cli import main


@dataclass(frozen=True)
class Outcome:
    """The output of a command and its exit code."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """The lines that begin with `error:`, without it."""
        return [line.removeprefix("error: ") for line in self.err.splitlines() if line.startswith("error: ")]


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> Outcome:
    """Run `hyperscale ARGUMENTS` as its entry point does."""
    capsys.readouterr()
    with _logger_as_it_was():
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as ended:  # argparse's own refusals
            code = int(ended.code or 0)
    captured = capsys.readouterr()
    return Outcome(code, captured.out, captured.err)


@contextmanager
def _logger_as_it_was() -> Iterator[None]:
    """Take our log handler away again: it writes to the standard error of one test."""
    logger = logging.getLogger("hyperscale")
    before = logger.handlers[:], logger.level, logger.propagate
    logger.handlers[:] = []
    try:
        yield
    finally:
        logger.handlers[:], logger.propagate = before[0], before[2]
        logger.setLevel(before[1])


def tree(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder with its content."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }
