"""Failures of a download that may disappear without any change."""

from collections.abc import Iterator

_TEMPORARY = {408, 425, 429}
"""Request timeout, too early, too many requests. All statuses from 500 up are temporary too."""


def may_recover(error: BaseException) -> bool:
    """Return whether a request may succeed if it is sent again.

    If the server sent an HTTP status, the status decides. Without a status the server was not reached, which counts
    as temporary unless `error` is a `ValueError`: then the request itself was malformed.
    """
    for cause in _causes(error):
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if isinstance(status, int):
            return status in _TEMPORARY or status >= 500
    return not isinstance(error, ValueError)


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__
