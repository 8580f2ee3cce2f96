"""Checks what is in a wheel: all of the package, nothing else, nothing for one platform."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
_MADE = {"psyche_fast/commit.txt"}
"""Not in the repository."""


def faults(wheel: Path, tracked: set[str], commit: str | None) -> list[str]:
    """What is wrong with a wheel.

    Args:
        wheel: the file.
        tracked: the package's files.
        commit: which it has to say; None where there is no repository to ask.
    """
    found = []
    if not wheel.name.endswith("-py3-none-any.whl"):
        found.append(f"{wheel.name} is not for all platforms")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not re.match(r"[^/]+\.dist-info/", name)}
        said = archive.read("psyche_fast/commit.txt").decode() if names >= _MADE else ""
    found += [f"{name} is missing" for name in sorted(tracked - names)]
    found += [f"{name} does not belong there" for name in sorted(names - tracked - _MADE)]
    if commit is not None and not said.startswith(commit):
        found.append(f"wanted commit {commit}, got {said.strip() or 'none'}")
    return found


def _git(*arguments: str) -> str:
    git = ["git", "-C", str(_ROOT), *arguments]
    return subprocess.run(git, capture_output=True, text=True, check=True).stdout


def main() -> None:
    """Fails with a line for each fault."""
    listed = _git("ls-files", "--cached", "--others", "--exclude-standard", "psyche_fast")
    tracked = {name for name in listed.splitlines() if (_ROOT / name).exists()}
    wrong = faults(Path(sys.argv[1]), tracked, _git("rev-parse", "HEAD")[:12])
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
