"""Amounts as people write them, and how long a run goes on: steps, tokens, time."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

_SUFFIXES = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}
_COUNT = re.compile(r"(\d[\d_]*(?:\.\d+)?(?:e\d+)?)\s*([kmbgt]?)", re.IGNORECASE)
_UNITS = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0}
_DURATION = re.compile(r"(?:\d+(?:\.\d+)?[dhms])+", re.IGNORECASE)
_PART = re.compile(r"(\d+(?:\.\d+)?)([dhms])", re.IGNORECASE)
_CLOCK = re.compile(r"(?:(\d+)-)?(\d+):(\d\d)(?::(\d\d))?")


def parse_count(text: str) -> int:
    """A number such as `2_000_000`, `20M`, `1.5B`, `3e9` or `2T`.

    Raises:
        ValueError: it is none, or not a whole one.
    """
    found = _COUNT.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"wanted a number such as 300000000, 300M or 1.5B, got {text!r}")
    exact = float(found[1].replace("_", "")) * _SUFFIXES[found[2].lower()]
    if not math.isfinite(exact) or exact != math.floor(exact):
        raise ValueError(f"wanted a whole number, got {text!r}")
    return int(exact)


def parse_duration(text: str) -> float:
    """Seconds of a time such as `90m`, `8h`, `1d12h`, `1:30:00`, `2-00:00:00` or `3600`.

    Raises:
        ValueError: it is none.
    """
    text = text.strip()
    if found := _CLOCK.fullmatch(text):
        days, first, second, third = (int(part or 0) for part in found.groups())
        # Slurm's forms: minutes:seconds, hours:minutes:seconds, days-hours:minutes[:seconds].
        if found[4] is None and found[1] is None:
            return 60.0 * first + second
        return 86400.0 * days + 3600.0 * first + 60.0 * second + third
    if _DURATION.fullmatch(text):
        return sum(float(number) * _UNITS[unit.lower()] for number, unit in _PART.findall(text))
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not math.isfinite(seconds):
        raise ValueError(f"wanted a time such as 90m, 8h, 1d12h or 1:30:00, got {text!r}")
    return seconds


def parse_micro_batch(text: str) -> int:
    """Sequences, or 0 for `auto`.

    Raises:
        ValueError: neither.
    """
    if text.strip().lower() == "auto":
        return 0
    if not text.strip().isdecimal():
        raise ValueError(f"wanted a whole number or auto, got {text!r}")
    return int(text)


def steps_of(tokens: int, sizes: Any) -> int:
    """The steps that it takes until a run has seen so many tokens, at least one.

    Args:
        tokens: how many.
        sizes: `BatchSizes`.
    """
    sequences = -(-tokens // sizes.sequence_length)
    few, many = 0, 1
    while sizes.before(many + 1) < sequences:
        few, many = many, 2 * many
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (few, middle) if sizes.before(middle + 1) >= sequences else (middle, many)
    return many


def fill(values: Mapping[str, Any], sizes: Any, total_steps: int) -> dict[str, int]:
    """What a run's `--total-tokens` and `--warmup-fraction` stand for.

    Args:
        values: what was given, by the flags' names.
        sizes: the run's `BatchSizes`.
        total_steps: steps where no tokens are given.

    Returns:
        `total_steps` and `warmup_steps`, where they follow.

    Raises:
        ValueError: both are given, and differ.
    """
    found: dict[str, int] = {}
    if values.get("total_tokens") is not None:
        total_steps = steps_of(values["total_tokens"], sizes)
        found["total_steps"] = total_steps
    if values.get("warmup_fraction") is not None:
        found["warmup_steps"] = round(values["warmup_fraction"] * total_steps)
    names = {"total_steps": "total_tokens", "warmup_steps": "warmup_fraction"}
    for name, steps in found.items():
        if values.get(name, steps) != steps:
            of, own = (n.replace("_", "-") for n in (names[name], name))
            raise ValueError(
                f"--{own} {values[name]} and --{of} {values[names[name]]:g}, which is {steps} "
                "steps: give one of them"
            )
    return found
