"""Numbers as people read them."""

import math


def duration(seconds: float) -> str:
    """Return `45s`, `3m 05s`, `2h 07m` or `1d 03h`."""
    if not math.isfinite(seconds):
        return "?"
    whole = max(0, round(seconds))
    for unit, size, smaller, parts in (("d", 86_400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size}{unit} {whole % size // parts:02d}{smaller}"
    return f"{whole}s"


def count(number: float) -> str:
    """Return `512`, `1,540`, `3.5 M` or `70.6 G`."""
    for unit, size in (("G", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number:,.0f}"


def counted(number: int, noun: str) -> str:
    """Return `1 task` or `7 tasks`."""
    return f"{number} {noun}" if number == 1 else f"{number:,} {noun}s"


def score(value: float | None) -> str:
    """Return a score in percent with one digit, or `–` if there is none."""
    return "–" if value is None or math.isnan(value) else f"{value:.1f}"


def gain(value: float | None) -> str:
    """Return a difference of scores with its sign, or `–` if there is none."""
    return "–" if value is None or math.isnan(value) else f"{value:+.1f}".replace("-", "−")
