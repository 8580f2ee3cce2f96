"""What the tests of the doctor share."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from psyche_fast.doctor.finding import Finding

ORDER = ("ok", "warning", "problem")


def worst(findings: Iterable[Finding]) -> dict[str, Finding]:
    """The worst finding of each name."""
    found: dict[str, Finding] = {}
    for one in findings:
        before = found.get(one.name)
        if before is None or ORDER.index(one.status) > ORDER.index(before.status):
            found[one.name] = one
    return found


def program(folder: Path, name: str, script: str) -> None:
    """Writes a program of that name, a shell script."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
