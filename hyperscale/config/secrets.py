"""Values without their secrets, for records that more people read than the recipe."""

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

MASK = "***"

_URI = re.compile(r"\b([A-Za-z][A-Za-z0-9+.-]*)://(\S+)")
_PORT = re.compile(r":\d{0,5}$")
_SECRET_NAME = r"(?:password|passwd|pwd|secret|token|api_?key|access_?key|private_?key|signature|sig|credential)"
_SECRET_PARAMETER = re.compile(rf"([?&;](?:[\w.-]*[_.-])?{_SECRET_NAME}=|[?&;]sslpassword=)[^&\s]*", re.IGNORECASE)
_SECRET_KEY = re.compile(r"(?:.*[_-])?(?:password|passwd|secret|api_?key|access_token|auth_token)", re.IGNORECASE)
_VARIABLE = re.compile(r"(?:[^:@/\s]*:)?\$\{[A-Za-z_]\w*\}")
_DATABASES = ("postgres", "mysql", "mariadb", "mssql", "oracle")
_SAFE_IN_CREDENTIALS = ":%!$&'()*+,;=~"
"""RFC 3986, section 3.2.1, and the percent sign of what is encoded already."""
_CONTAINERS = ("abfs", "abfss", "wasb", "wasbs", "az", "adl")


def without_credentials(value: Any) -> Any:
    """Return JSON values with every secret replaced by `***`.

    Secrets are the `user:password` of a URI anywhere in a text, the values of parameters such as `?token=` and
    `&password=`, and the values of keys such as `api_key`. Passwords may hold `@` and `/`: the host begins after the
    last `@`. A user name and password that are `${VARIABLE}` stay: they name a secret and hold none.
    """
    if isinstance(value, str):
        return _SECRET_PARAMETER.sub(rf"\g<1>{MASK}", _URI.sub(_masked, value))
    if isinstance(value, Mapping):
        return {key: _entry(str(key), entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [without_credentials(entry) for entry in value]
    return value


def is_masked(uri: str) -> bool:
    """Return whether a URI has lost a secret that it needs."""
    return MASK in uri


def with_quoted_credentials(uri: str) -> str:
    """Return a URI whose user name and password are percent-encoded, so that its clients find the host.

    Characters that are encoded already stay so: `p@ss/word` and `p%40ss%2Fword` give the same URI.
    """
    return _URI.sub(_quoted, uri)


def _entry(key: str, value: Any) -> Any:
    if isinstance(value, str) and value and _SECRET_KEY.fullmatch(key) and not _VARIABLE.fullmatch(value):
        return MASK
    return without_credentials(value)


def _masked(uri: re.Match[str]) -> str:
    scheme, rest = uri.groups()
    user, separator, host = rest.rpartition("@")
    if not separator or not _is_user(scheme.lower(), rest) or _VARIABLE.fullmatch(user):
        return uri.group()
    return f"{scheme}://{MASK}@{host}"


def _quoted(uri: re.Match[str]) -> str:
    scheme, rest = uri.groups()
    user, separator, host = rest.rpartition("@")
    if not separator or not _is_user(scheme.lower(), rest):
        return uri.group()
    return f"{scheme}://{quote(user, safe=_SAFE_IN_CREDENTIALS)}@{host}"


def _is_user(scheme: str, rest: str) -> bool:
    """Distinguish `user:pass/word@host` from `host:8020/folder@2026` and from the containers of Azure's URIs."""
    start = re.split(r"[/?#]", rest, maxsplit=1)[0]
    if scheme in _CONTAINERS and ":" not in start:
        return False
    if "@" in start:
        return True
    # The first @ comes after a slash: in a path, or in a password that holds a slash.
    return ":" in start and (scheme.startswith(_DATABASES) or _PORT.search(start) is None)
