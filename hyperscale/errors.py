"""The errors that a user can cause and fix.

Each message says what is wrong, where, and what to do about it. The command line prints the message alone and
exits with `exit_code`; `--debug` adds the traceback. Anything else that escapes is a defect of ours.
"""

import difflib
from collections.abc import Iterable


class HyperscaleError(Exception):
    """An error that the user can fix. Never raised for a defect of our own.

    Args:
        message: what is wrong, where, and what to do about it.
        is_transient: whether another attempt may succeed without a change: a network or storage failure. Launchers
            then restart the workers, `cluster.max_failures` times at most; any other error ends the run at once.
    """

    exit_code = 1
    is_transient: bool = False

    def __init__(self, message: str = "", *, is_transient: bool | None = None) -> None:
        super().__init__(message)
        if is_transient is not None:
            self.is_transient = is_transient


class ConfigError(HyperscaleError):
    """The recipe or an override is wrong: unknown key, wrong type, sections that contradict each other."""

    exit_code = 2


class PluginError(ConfigError):
    """A plug-in cannot be loaded, or registers a name that is taken."""


class DataError(HyperscaleError):
    """A task file or its rows are wrong: missing column, malformed line, unknown label, no rows."""


class AssetError(HyperscaleError):
    """A pinned package could not be fetched, or its content does not match its digest."""


class BackboneError(HyperscaleError):
    """The backbone's folder or architecture cannot be used."""


class CheckpointError(HyperscaleError):
    """A checkpoint is missing, damaged, or belongs to another site map."""


class EngineError(HyperscaleError):
    """The engine's configuration contradicts the recipe, or the machine lacks what it needs."""


class ResourceError(HyperscaleError):
    """The cluster cannot give what the recipe asks for."""


class RunFolderError(HyperscaleError):
    """The run folder is busy, not writable, or private to one of several nodes."""


class BundleError(HyperscaleError):
    """A bundle cannot be written in the requested format, or cannot be read."""


class RunStopped(HyperscaleError):  # noqa: N818 - nothing went wrong
    """A run ended before its last step because it was asked to, after it had saved what it had. Not a failure."""

    exit_code = 143


def nearest(word: str, known: Iterable[str]) -> str:
    """Return `" Did you mean 'x'?"` for the closest known spelling, or an empty string."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean '{matches[0]}'?" if matches else ""
