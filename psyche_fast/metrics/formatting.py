"""Numbers as people read them: counts, bytes, durations."""

from __future__ import annotations

import math


def _scaled(value: float, units: tuple[str, ...]) -> tuple[str, str]:
    """Scales by thousands until three digits are left; 999.96 becomes 1.00 of the next unit."""
    index = 0
    while abs(value) >= 999.5 and index < len(units) - 1:
        value /= 1000.0
        index += 1
    digits = 0 if index == 0 or abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    return f"{value:.{digits}f}", units[index]


def format_count(value: float) -> str:
    """Formats a count or a rate with three digits and a unit: `12345` -> `12.3k`."""
    if not math.isfinite(value):
        return str(value)
    number, unit = _scaled(value, ("", "k", "M", "G", "T"))
    return number + unit


def format_bytes(value: float) -> str:
    """Formats a number of bytes in decimal units, as networks count: `1500` -> `1.50 kB`."""
    number, unit = _scaled(value, ("B", "kB", "MB", "GB", "TB", "PB"))
    return f"{number} {unit}"


def format_duration(seconds: float) -> str:
    """Formats seconds as `hh:mm:ss`, with days in front from one day on: `1d 00:00:05`."""
    if not math.isfinite(seconds) or seconds < 0:
        return "--:--:--"
    days, rest = divmod(round(seconds), 86_400)
    hours, rest = divmod(rest, 3600)
    minutes, secs = divmod(rest, 60)
    clock = f"{hours:02d}:{minutes:02d}:{secs:02d}"
    return f"{days}d {clock}" if days else clock
