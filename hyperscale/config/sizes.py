"""Amounts of memory as people write them: `500MiB`, `2GiB`, `80 GB`."""

import re

_UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


def parse_size(text: str) -> int:
    """Return `text` as a number of bytes.

    Raises:
        ValueError: not a number with a unit.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?i?B)", text.strip(), flags=re.IGNORECASE)
    if not match:
        raise ValueError(f"'{text}' is not an amount of memory: write a number and a unit, such as 500MiB or 2GiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def format_size(num_bytes: float) -> str:
    """Return bytes for a reader: `1.5 GiB`, `12.0 MiB`."""
    for name in ("TiB", "GiB", "MiB", "KiB"):
        if abs(num_bytes) >= _UNITS[name.upper()]:
            return f"{num_bytes / _UNITS[name.upper()]:.1f} {name}"
    return f"{num_bytes:.0f} B"
