"""The file in a run folder that asks a live run to stop. Rank 0 looks for it between steps."""

from contextlib import suppress

from hyperscale.checkpoint.run_folder import read_owner
from hyperscale.errors import RunFolderError
from hyperscale.places import Place, open_place

_STOP = "stop-request"


def request_stop(folder: str, reason: str) -> None:
    """Ask the run in a folder to save its current step and to end.

    Args:
        reason: what the run reports: `SIGTERM`, `hyperscale stop`.

    Raises:
        RunFolderError: the request cannot be written.
    """
    place = _file(folder)
    try:
        place.fs.pipe_file(place.path, reason.encode())
    except OSError as error:
        raise RunFolderError(f"{place} cannot be written: {error.strerror or error}") from error


def requested_stop(folder: str) -> str | None:
    """Return the reason of a request, or None. A storage that does not answer counts as no request."""
    place = _file(folder)
    try:
        place.fs.invalidate_cache()
        return place.fs.cat_file(place.path).decode() or None
    except OSError:
        return None


def clear_stop(folder: str) -> None:
    """Remove a request that an earlier run has answered, or that came after its end."""
    place = _file(folder)
    with suppress(OSError):
        place.fs.rm_file(place.path)


def is_running(folder: str) -> bool:
    """Return whether a live process writes in a run folder."""
    place = open_place(folder)
    owner = read_owner(place)
    return owner is not None and owner.is_alive(place)


def _file(folder: str) -> Place:
    return open_place(folder).child(_STOP)
