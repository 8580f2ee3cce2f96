"""What the compile guard allows: limits per case and target, and the project's own ceilings.

Compilers differ, so there is a file of limits, `limits-VERSION.toml`, for the oldest version of
Triton that the project takes and for the one that it pins. It is written from measurements
(`make kernels ARGS=--update-limits`) with a margin, so that a change of cost shows as a diff of
one line per case and target. `CEILINGS` are what the kernels were designed to; no measurement moves
them.
"""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from tools.kernel_guard.aot import TARGETS, Measurement

FOLDER = Path(__file__).parent

HEADER = """\
# Upper limits of the compile guard, one line per kernel and GPU; checked by `make kernels
# ARGS=--check`, rewritten by `make kernels ARGS=--update-limits`: what it measures, plus margins:
#
#   registers       per thread: 4 more
#   spills          bytes of local memory per thread: 8 more, then up to a multiple of 16
#   shared          bytes of shared memory per block: none
#   instructions    executed per tile, counted by warp: 3 %, then up to a multiple of 10, or of 1
#                   below 1000
#   mma             matrix instructions in the code: exactly as many
#   round_barriers  barriers of the block in the rounds of the selection: none
#   refused         why the kernel cannot run on this GPU; it is an error if it then compiles
#
# They hold for the version of Triton named below. A version without such a file is held to the
# highest limit in any of them, and registers may then be 15 % more, spills 384 bytes, shared memory
# 25 %, instructions and matrix instructions 40 %: nothing was measured with it, and it is only to
# show what has gone badly wrong.
"""

Line: TypeAlias = dict[str, int | str]
"""Limits of one case on one target."""

FOREIGN: dict[str, tuple[float, int]] = {
    "registers": (1.15, 0),
    "spills": (1.0, 384),
    "shared": (1.25, 0),
    "instructions": (1.4, 0),
    "mma": (1.4, 0),
    "round_barriers": (1.0, 0),
}
"""Factor and addend on a limit under a Triton that none were measured with, and on a ceiling under
another than the kernels were designed with."""

DESIGNED_WITH = "3.7.1"
"""The version of Triton under which the ceilings hold to the letter: the pinned one. Its compiler
decides the last few percent of a kernel's instructions."""


@dataclass(frozen=True)
class Limits:
    """Contents of a file of limits: Triton's version, and lines by case and target.

    `triton` is "" where it is none in particular.
    """

    triton: str = ""
    cases: dict[str, dict[str, Line]] = field(default_factory=dict)


@dataclass(frozen=True)
class Ceiling:
    """What a group of cases may cost at most, by design.

    Attributes:
        metric: field of `Measurement`.
        most: largest value.
        pattern: regular expression that the case's name begins with.
        target: the GPU; None for all of NVIDIA's.
        tag: a tag that the case has, "" for any.
        largest_k: cases with more entries per chunk (k=... in the name) are left out.
    """

    metric: str
    most: int
    pattern: str = ""
    target: str | None = "sm_90"
    tag: str = ""
    largest_k: int | None = None

    def covers(self, measured: Measurement) -> bool:
        """Whether it holds for a case on a target."""
        if self.target not in (measured.target, None) or not TARGETS[measured.target].nvidia:
            return False
        if self.tag and self.tag not in measured.tags:
            return False
        k = re.search(r"\bk=(\d+)", measured.name)
        if k is not None and self.largest_k is not None and int(k[1]) > self.largest_k:
            return False
        return re.match(self.pattern, measured.name) is not None


CEILINGS = (
    Ceiling("spills", 72, tag="64x64", largest_k=32),
    Ceiling("spills", 128, tag="64x64 anchored", largest_k=32),
    Ceiling("round_barriers", 0, tag="rounds", target=None),
    # A tenth of them chooses rows for scratch memory: measured, encode is a sixth faster by it.
    Ceiling("instructions", 5100, r"encode 64x64 k=8 .* gradient$"),
    Ceiling("instructions", 7500, r"encode 64x64 k=32 .* gradient$"),
    # 128 entries: 16 peers with 8 each.
    Ceiling("instructions", 4250, r"apply 64x64 128 signs, bf16 .*, fp32 delta, bf16 look-ahead$"),
    Ceiling("instructions", 4600, r"apply 64x64 128 signs, fp32 .*, fp32 delta, bf16 look-ahead$"),
)


def path_of(triton: str, folder: Path = FOLDER) -> Path:
    """The file with the limits of a version of Triton."""
    return folder / f"limits-{triton}.toml"


def read_all(folder: Path = FOLDER) -> dict[str, Limits]:
    """Reads the files of limits, by version of Triton.

    Raises:
        ValueError: a file is malformed, or is named after another version than it is of.
    """
    known = {}
    for path in sorted(folder.glob("limits-*.toml")):
        limits = _read(path)
        if path != path_of(limits.triton, folder):
            raise ValueError(f"{path} is of Triton {limits.triton}")
        known[limits.triton] = limits
    return known


def _read(path: Path) -> Limits:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        return Limits(content["triton"], content.get("limits", {}))
    except (tomllib.TOMLDecodeError, KeyError) as error:
        raise ValueError(f"{path} is malformed: {error!r}") from error


def write(limits: Limits, folder: Path = FOLDER) -> Path:
    """Writes the file of a version's limits, sorted, one line per case and target; returns it."""
    lines = [HEADER, f"triton = {json.dumps(limits.triton)}"]
    for name in sorted(limits.cases, key=_natural):
        lines += ["", f"[limits.{json.dumps(name)}]"]
        for target, line in sorted(limits.cases[name].items(), key=lambda item: _natural(item[0])):
            values = ", ".join(f"{key} = {json.dumps(value)}" for key, value in line.items())
            lines.append(f"{target} = {{ {values} }}")
    path = path_of(limits.triton, folder)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _natural(text: str) -> list[tuple[int, str]]:
    """Sorts k=8 before k=32."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", text)]


def with_margin(metric: str, value: float) -> int:
    """The limit for a value that was measured, by the rule in the file's header."""
    if metric == "registers":
        return int(value) + 4
    if metric == "spills":
        return math.ceil((value + 8) / 16) * 16
    if metric == "instructions":
        step = 10 if value >= 1000 else 1
        return math.ceil(value * 1.03 / step) * step
    return int(value)


def updated(old: Limits, measured: Sequence[Measurement], triton: str, *, whole: bool) -> Limits:
    """The limits that follow from measurements.

    Args:
        old: those of this version so far.
        measured: what was measured.
        triton: version of Triton that it was measured with.
        whole: all cases were measured on all targets: lines of others go.

    Raises:
        ValueError: only a part was measured, and there are no limits of this version to go on from.
    """
    if not whole and old.triton != triton:
        raise ValueError(
            f"there are no limits for Triton {triton} yet: take all of them at once, "
            "without --target and --kernel"
        )
    cases = {} if whole else {name: dict(lines) for name, lines in old.cases.items()}
    for one in measured:
        cases.setdefault(one.name, {})[one.target] = _line(one)
    return Limits(triton, cases)


def _line(one: Measurement) -> Line:
    if one.refused is not None:
        return {"refused": one.refused}
    values = {metric: getattr(one, metric) for metric in FOREIGN}
    return {metric: with_margin(metric, v) for metric, v in values.items() if v is not None}


def allowed(known: Mapping[str, Limits], triton: str) -> Limits:
    """What is allowed under a version: its own limits, or the highest of all (`triton` is "")."""
    if triton in known:
        return known[triton]
    merged: dict[str, dict[str, Line]] = {}
    for limits in known.values():
        for name, lines in limits.cases.items():
            for target, line in lines.items():
                before = merged.setdefault(name, {}).get(target)
                merged[name][target] = line if before is None else _highest(before, line)
    return Limits("", merged)


def _highest(one: Line, other: Line) -> Line:
    """The higher limit of each metric; a kernel that some version compiles is to compile."""
    if "refused" in one or "refused" in other:
        return other if "refused" in one else one
    return {metric: max(one.get(metric, 0), other.get(metric, 0)) for metric in one | other}  # type: ignore[type-var]


def check(measured: Sequence[Measurement], limits: Limits, *, whole: bool = True) -> list[str]:
    """What breaks a limit or a ceiling, one line each; empty where all is well.

    Args:
        measured: what was measured.
        limits: what is `allowed`.
        whole: all cases were measured on all targets, so that a line for another is stale.
    """
    foreign = limits.triton == ""  # no version's own
    faults = [fault for one in measured for fault in _faults(one, limits, foreign)]
    if whole:
        current = {(one.name, one.target) for one in measured}
        for name, lines in limits.cases.items():
            stale = [target for target in lines if (name, target) not in current]
            if stale:
                faults.append(f"{name} on {', '.join(stale)}: limits of a case that is gone")
        for ceiling in CEILINGS:
            if not any(ceiling.covers(one) for one in measured):
                faults.append(f"the ceiling on {ceiling.metric} of {ceiling.pattern!r} has no case")
    return faults


def _faults(one: Measurement, limits: Limits, foreign: bool) -> Iterable[str]:
    where = f"{one.name} on {one.target}"
    line: dict[str, Any] | None = limits.cases.get(one.name, {}).get(one.target)
    if line is None:
        yield f"{where}: has no limits (make kernels ARGS=--update-limits)"
        return
    if one.refused is not None:
        if "refused" not in line:
            yield f"{where}: {one.refused}"
        return
    if "refused" in line:
        yield f"{where}: compiles, though the limits say: {line['refused']}"
        return
    if one.uncounted is not None:
        yield f"{where}: {one.uncounted}"
    for pair in one.races:
        yield f"{where}: {pair}"
    for metric, (factor, addend) in FOREIGN.items():
        value, limit = getattr(one, metric), line.get(metric)
        if value is None or limit is None:
            if value is not limit and one.uncounted is None:
                yield f"{where}: {metric} {value}, the limit is {limit} (--update-limits)"
            continue
        most = limit * factor + addend if foreign else limit
        if value > most:
            yield f"{where}: {metric} {value:g}, at most {most:g}"
        elif metric == "mma" and value < limit and not foreign:
            yield f"{where}: {metric} {value:g}, not {limit}: is a product done without them?"
    to_the_letter = limits.triton == DESIGNED_WITH
    for ceiling in CEILINGS:
        value = getattr(one, ceiling.metric)
        factor, addend = FOREIGN[ceiling.metric]
        most = ceiling.most if to_the_letter else ceiling.most * factor + addend
        if ceiling.covers(one) and value is not None and value > most:
            yield f"{where}: {ceiling.metric} {value:g}, designed for at most {most:g}"
