"""What a run directory tells: metrics, settings, signs of life, logs, samples.

Whatever is there is read, of runs that go on, were killed, have several lives, or are of another
version: what is missing or torn is left out and said.
"""

from __future__ import annotations

import os
import platform
import re
import time
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

import msgspec

_LOG_LINE = re.compile(
    r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)(?:,\d+)?([+-]\d{4})? rank (\d+) ([A-Z]+) (.*)"
)
_BEGINS = "training begins"
_LOG_BYTES = 8 << 20
"""Of each log the last so many are read: what a run has said lately is at its end."""
_STACK_LINES = 60
SILENT = 10.0
"""Seconds without a sign of life, of which there is one a second."""

PHASES = {
    "loading": "ranks load the model",
    "data": "waits for data (--data-path)",
    "send": "sends the next step to the other replicas",
    "train": "computes, or waits for the other ranks of its replica",
    "optimize": "applies results, or waits for those of other replicas",
    "counts": "waits for the counts of all ranks",
    "checkpoint": "writes a checkpoint",
    "join": "hands a replica that joins the state",
    "evaluate": "evaluates on held-out data",
    "sample": "continues prompts",
    "waiting": "waits for the next step",
}
"""What a rank does in a phase, as its signs of life name it."""


@dataclass(frozen=True)
class Event:
    """Something that happened to a run.

    Attributes:
        time: seconds since 1970; None where nobody knows.
        step: likewise.
        kind: what.
        text: more of it.
    """

    time: float | None
    step: int | None
    kind: str
    text: str


@dataclass(frozen=True)
class State:
    """Whether a run goes on.

    Attributes:
        name: `finished`, `failed`, `running`, `stalled`, `gone` or `unknown`.
        lines: what is known of it, the most important first.
    """

    name: str
    lines: list[str]


@dataclass
class RunFiles:
    """What was found in a run directory.

    Attributes:
        folder: the directory.
        name: what to call it.
        lines: of `metrics.jsonl`, by step.
        times: of each line, seconds since the first one began; breaks between lives count.
        began: when that was, seconds since 1970; None where no line says when it was written.
        settings: of `config.toml`, by name.
        samples: of `samples.jsonl`.
        events: in the order of time, those without one first.
        status: of `status.json`.
        stacks: file names, and the ends of what ranks were doing when the run hung.
        lives: how often the run has begun.
        notes: what could not be read.
    """

    folder: Path
    name: str
    lines: list[dict[str, Any]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    began: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    status: dict[str, Any] = field(default_factory=dict)
    stacks: dict[str, str] = field(default_factory=dict)
    lives: int = 0
    notes: list[str] = field(default_factory=list)

    def numbers(self, name: str) -> list[float | None]:
        """A field of each line; None where it is missing or no number."""
        return [number(line.get(name)) for line in self.lines]

    @property
    def usual_seconds(self) -> float | None:
        """How long a step usually takes."""
        known = [n for n in self.numbers("step_seconds")[-200:] if n is not None]
        return median(known) if known else None


def number(value: Any) -> float | None:
    """A number, as lines of other versions may have it."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number else None


def read_run(folder: str | os.PathLike[str]) -> RunFiles:
    """Reads all that a run directory has.

    Raises:
        ValueError: there is nothing of a run in it.
    """
    path = Path(folder)
    names = ("metrics.jsonl", "config.toml", "status.json", "logs", "checkpoints")
    if not any((path / name).exists() for name in names):
        raise ValueError(
            f"{path} is no run directory: it has none of {', '.join(names)}"
            + ("" if path.is_dir() else "; there is no such folder")
        )
    run = RunFiles(path, path.resolve().name)
    by_step: dict[int, dict[str, Any]] = {}
    for line in _read_lines(path / "metrics.jsonl", run.notes):
        step = line.get("step")
        if isinstance(step, int) and not isinstance(step, bool):
            by_step.pop(step, None)  # a later life has gone through it again
            by_step[step] = line
    run.lines = [by_step[step] for step in sorted(by_step)]
    run.times, run.began = _times(run.lines)
    run.samples = list(_read_lines(path / "samples.jsonl", run.notes))
    try:
        tables = tomllib.loads((path / "config.toml").read_text(encoding="utf-8"))
        for name, value in tables.items():
            run.settings |= value if isinstance(value, dict) else {name: value}
    except (OSError, ValueError) as error:
        run.notes.append(f"config.toml: {error}")
    with suppress(OSError, ValueError):  # there is none before the first second
        status = msgspec.json.decode((path / "status.json").read_bytes())
        run.status = status if isinstance(status, dict) else {}
    run.events = _events(run)
    for file in sorted(path.glob("logs/stacks-rank-*.txt"))[:64]:
        with suppress(OSError):
            text = file.read_text(encoding="utf-8", errors="replace")
            # Python names the main thread last.
            run.stacks[file.name] = "\n".join(text.splitlines()[-_STACK_LINES:])
    return run


def _read_lines(path: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        if path.name == "metrics.jsonl":
            notes.append(f"{path.name}: {error.strerror}")
        return
    damaged = 0
    for number_, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield msgspec.json.decode(line, type=dict[str, Any])
        except (ValueError, RecursionError):
            damaged += number_ < len(lines)  # the last one is being written, or was
    if damaged:
        notes.append(f"{path.name}: {damaged} lines cannot be read and are left out")


def _times(lines: list[dict[str, Any]]) -> tuple[list[float], float | None]:
    """Seconds since the first line's step began, and when that was."""
    took = [number(line.get("step_seconds")) or 0.0 for line in lines]
    written = [number(line.get("time")) for line in lines]
    first = written[0] if lines else None
    began = None if first is None else first - took[0]
    times: list[float] = []
    now = 0.0
    for at, seconds in zip(written, took, strict=True):
        now += seconds
        if at is not None and began is not None:
            now = max(now - seconds, at - began)
        times.append(now)
    return times, began


def _events(run: RunFiles) -> list[Event]:
    events = [*_events_of_lines(run), *_events_of_logs(run)]
    return sorted(events, key=lambda e: (e.time is not None, e.time or 0.0, e.step or 0))


def _events_of_lines(run: RunFiles) -> Iterator[Event]:
    members: float | None = None
    for line in run.lines:
        step, at = line["step"], number(line.get("time"))
        for kind in ("refused_results", "left_out_results"):
            by = line.get(kind)
            if isinstance(by, dict) and by:
                yield Event(at, step, kind, ", ".join(f"replica {r}: {n}" for r, n in by.items()))
        for kind in ("refused_gradients", "nonfinite_losses", "lost_rows"):
            if count := number(line.get(kind)):
                yield Event(at, step, kind, f"{count:g}")
        here = number(line.get("members"))
        if here is not None and members not in (None, here):
            yield Event(at, step, "members", f"{members:g} -> {here:g} replicas")
        members = here if here is not None else members


def _events_of_logs(run: RunFiles) -> Iterator[Event]:
    for path in sorted(run.folder.glob("logs/rank-*.log")):
        with suppress(OSError), path.open("rb") as file:
            size = path.stat().st_size
            file.seek(max(0, size - _LOG_BYTES))
            text = file.read().decode(errors="replace")
            is_first = path.name == "rank-0.log"
            for found in map(_LOG_LINE.fullmatch, text.splitlines()):
                if found is None:
                    continue
                day, zone, rank, level, said = found.groups()
                at = datetime.strptime(day + (zone or ""), _FORMS[bool(zone)]).timestamp()
                if is_first and said == _BEGINS:
                    run.lives += 1
                    if run.lives > 1:
                        yield Event(at, None, "restart", f"start {run.lives}")
                elif level in ("WARNING", "ERROR", "CRITICAL"):
                    yield Event(at, None, level.lower(), f"rank {rank}: {said}")
                elif said.startswith("where it happened"):
                    yield Event(
                        at, None, "error", f"rank {rank} ended by an error, see {path.name}"
                    )


_FORMS = {False: "%Y-%m-%d %H:%M:%S", True: "%Y-%m-%d %H:%M:%S%z"}


def state_of(run: RunFiles, now: float | None = None) -> State:
    """Whether a run goes on, and if not, what it waits for.

    Args:
        run: the run.
        now: seconds since 1970.
    """
    now, status = time.time() if now is None else now, run.status
    last = run.lines[-1]["step"] if run.lines else None
    moved = f"step {last} is the last one done" if last is not None else "no step is done yet"
    written = _modified(run.folder / "metrics.jsonl")
    if last is not None and written is not None:
        moved += f", {_ago(now - written)}"
    if not status:
        return State("unknown", [moved, "no status.json: the run is of a version without one"])
    ended = status.get("ended")
    if isinstance(ended, str):
        good = ended.startswith(("finished", "stopped", "ended"))
        then = [] if good else [line for line, _ in _ranks(status)]
        return State("finished" if good else "failed", [ended, moved, *then])
    heard, since = number(status.get("time")) or 0.0, number(status.get("since")) or 0.0
    place = f"rank 0 on {status.get('host')} (process {status.get('pid')})"
    step, phase = status.get("step"), status.get("phase")
    doing = f"{place} is at step {step}: {_said(phase)}"
    ranks = _ranks(status)
    silent = [line for line, at in ranks if at is None or heard - at > SILENT]
    if now - heard > SILENT:
        is_here = status.get("host") == platform.node() and isinstance(status.get("pid"), int)
        there = "" if not is_here else (
            "; the process is there, so it is stopped" if _exists(status["pid"])
            else "; the process is gone: it was killed"
        )  # fmt: skip
        lines = [f"{place} has given no sign of life, {_ago(now - heard)}{there}", moved, doing]
        return State("gone", [*lines, *silent])
    usual = run.usual_seconds
    long = max(10 * (usual or 0.0), 30.0)
    if since and now - since > long and phase not in ("checkpoint", "evaluate", "loading"):
        often = f" (usually {usual:.3g} s)" if usual else ""
        lines = [f"step {step} has been going on for {now - since:.0f} s{often}", doing, moved]
        behind = [line for line, at in ranks if line not in silent]
        if not silent:
            lines.append("all ranks give signs of life; who is behind is what others wait for:")
        return State("stalled", [*lines, *(f"silent: {line}" for line in silent), *behind])
    return State("running", [moved, doing, *(f"silent: {line}" for line in silent)])


def _ranks(status: dict[str, Any]) -> list[tuple[str, float | None]]:
    """The further ranks' last signs of life, in words, and when they came."""
    ranks = status.get("ranks")
    found = []
    for rank, beat in ranks.items() if isinstance(ranks, dict) else ():
        if not isinstance(beat, dict):
            continue
        at = number(beat.get("heard"))
        now = number(status.get("time"))
        when = "" if at is None or now is None else f", heard {max(0.0, now - at):.0f} s before"
        found.append(
            (
                f"rank {rank} on {beat.get('host')} was at step {beat.get('step')}: "
                f"{_said(beat.get('phase'))}{when}",
                at,
            )
        )
    return found


def _said(phase: Any) -> str:
    return f"{phase} ({PHASES[phase]})" if phase in PHASES else str(phase or "between phases")


def _ago(seconds: float) -> str:
    if seconds < 120:
        return f"{max(0.0, seconds):.0f} s ago"
    return f"{seconds / 60:.0f} min ago" if seconds < 7200 else f"{seconds / 3600:.1f} h ago"


def _modified(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
