"""Which psyche_fast this is, and with what it runs: for `--version`, and for reports.

Imports nothing that takes time.
"""

from __future__ import annotations

import platform
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path

from psyche_fast import __version__

COMMIT_FILE = Path(__file__).with_name("commit.txt")
"""Written into wheels when they are built; not in a repository."""
_LIBRARIES = ("torch", "triton", "transformers")


@cache
def commit() -> str | None:
    """The commit that this is of, with `-modified` where files differ; None where nobody knows."""
    if COMMIT_FILE.is_file():
        return COMMIT_FILE.read_text(encoding="utf-8").strip()
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():  # of a repository around an environment nothing is told
        return None
    git = ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(
            [*git, "--dirty=-modified"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):  # no git here, or not our folder to it
        return None
    return done.stdout.strip()


def version_lines() -> list[str]:
    """Version and commit; Python and the libraries that decide what a run does."""
    of = commit()
    versions = [f"Python {platform.python_version()}"]
    for name in _LIBRARIES:
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            versions.append(f"no {name}")
    return [f"psyche-fast {__version__}" + (f" ({of})" if of else ""), ", ".join(versions)]
