"""What a check has found, and how checks are carried out: each by itself, and for a time."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Status = Literal["ok", "warning", "problem"]
REPORT = "a fault of this check, or stranger: report it with the output of doctor --json"


@dataclass(frozen=True)
class Finding:
    """What is so, and what to do about it.

    Attributes:
        name: what was looked at.
        status: `ok`; `warning`, with which a run works, though not as well or not everywhere;
            `problem`, with which it does not.
        text: what was found, for a user.
        remedy: what to do; empty only where all is well.
    """

    name: str
    status: Status
    text: str
    remedy: str = ""

    def __post_init__(self) -> None:
        assert (self.status == "ok") == (self.remedy == ""), self


Check = Callable[[], Iterable[Finding]]


def ok(name: str, text: str) -> Finding:
    """All is well."""
    return Finding(name, "ok", text)


def warning(name: str, text: str, remedy: str) -> Finding:
    """A run works, though not as well as it might, or not everywhere."""
    return Finding(name, "warning", text, remedy)


def problem(name: str, text: str, remedy: str) -> Finding:
    """A run does not work."""
    return Finding(name, "problem", text, remedy)


def carry_out(name: str, check: Check, seconds: float = 15.0) -> list[Finding]:
    """Carries out one check, in a thread: a file server or a resolver may never answer.

    Args:
        name: what it is about.
        check: gives its findings.
        seconds: how long it may take.

    Returns:
        What it found; one problem more where it raised or took longer.
    """
    found: list[Finding] = []

    # One by one: what was found before it hung is said too.
    thread = threading.Thread(
        target=lambda: found.extend(isolated(name, check)), daemon=True, name=f"doctor: {name}"
    )
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        late = problem(
            name,
            f"no answer within {seconds:g} s",
            "look whether a network file system or a name server does not answer",
        )
        return [*found, late]
    return found


def isolated(name: str, check: Check) -> Iterator[Finding]:
    """What a check finds, and one problem more where it raises."""
    try:
        yield from check()
    except Exception as error:  # whatever it is, the other checks are worth their answers
        yield problem(name, f"the check failed: {described(error)}", REPORT)


def described(error: BaseException) -> str:
    """An error in one line, with where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    said = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {said}{where}"
