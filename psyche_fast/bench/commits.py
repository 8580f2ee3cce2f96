"""The suite of another commit, run by the code of that commit, in turns with this one's."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

from psyche_fast.bench import results
from psyche_fast.bench.suite import Report

_PACKAGE = Path(__file__).resolve().parents[1]


class Commit:
    """The package as it was.

    Args:
        name: what git knows it by.
        folder: takes its files.

    Raises:
        ValueError: git knows no such commit here, or it has no `bench`.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self._folder = name, folder
        self._rounds: list[Report] = []
        tree = _git("archive", "--format=tar", name, "--", _PACKAGE.name)
        if tree is None:
            raise ValueError(
                f"--compare {name}: neither a file nor a commit of the checkout at "
                f"{_PACKAGE.parent}"
            )
        with tarfile.open(fileobj=io.BytesIO(tree)) as files:
            files.extractall(folder, filter="data")
        if not (folder / _PACKAGE.name / "bench" / "command.py").exists():
            raise ValueError(f"--compare {name}: that commit has no `psyche-fast bench` yet")

    def round(self, arguments: Sequence[str], layers: str) -> None:
        """One round of its suite, in a process of its own.

        Args:
            arguments: of its command line: which cases, where.
            layers: that they are measured on.

        Raises:
            RuntimeError: it fails there; with its last line.
        """
        out = self._folder / f"round-{len(self._rounds)}.json"
        command = [sys.executable, "-m", _PACKAGE.name, "bench", *arguments]
        command += ["--rounds", "1", "--out", str(out)]
        environment = {**os.environ, "PYTHONPATH": str(self._folder)}
        done = subprocess.run(
            command, cwd=self._folder, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no word"])[-1]
            raise RuntimeError(f"--compare {self.name}: its own suite fails: {last}")
        self._rounds.append(results.read(out, layers))

    @property
    def report(self) -> Report:
        """All of its rounds."""
        return results.merged(self._rounds)


def _git(*arguments: str) -> bytes | None:
    """What git says in the folder that the package is in; None where it fails."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=_PACKAGE.parent, capture_output=True, check=False
        )
    except FileNotFoundError:
        return None
    return done.stdout if done.returncode == 0 else None
