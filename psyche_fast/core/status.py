"""`status.json`: where a run is, for whoever looks at its directory (`psyche-fast report`)."""

from __future__ import annotations

import logging
import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from psyche_fast.rank.beats import Beat

log = logging.getLogger("psyche_fast.core")


class Status:
    """Replaces the file in one piece; a disk that is full ends no run.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._temporary = path.with_name(f".{path.name}.tmp")
        self._last: dict[str, Any] = {
            "pid": os.getpid(), "host": platform.node(), "started": time.time(), "ended": None
        }  # fmt: skip
        self._complains = True
        self.write(None, None, "loading", {})

    def write(
        self,
        step: int | None,
        since: float | None,
        phase: str | None,
        ranks: Mapping[int, tuple[Beat, float]],
    ) -> None:
        """Says where the run is.

        Args:
            step: that rank 0 is in.
            since: when it began that, in seconds of `time.monotonic`.
            phase: rank 0's.
            ranks: the others' last signs of life, and when they came, likewise.
        """
        if self._last["ended"] is not None:
            return
        now, to_wall = time.time(), time.time() - time.monotonic()
        self._last |= {
            "time": now,
            "step": step,
            "since": None if since is None else since + to_wall,
            "phase": phase,
            "ranks": {
                str(rank): {
                    "step": beat.step, "phase": beat.phase, "host": beat.host, "heard": at + to_wall
                }
                for rank, (beat, at) in ranks.items()
            },
        }  # fmt: skip
        self._replace()

    def end(self, how: str) -> None:
        """Says how the run has ended: the first that is said stays."""
        if self._last["ended"] is not None:
            return
        self._last |= {"time": time.time(), "ended": how}
        self._replace()

    def _replace(self) -> None:
        try:
            self._temporary.write_bytes(msgspec.json.encode(self._last))
            self._temporary.replace(self._path)
            self._complains = True
        except OSError as error:
            if self._complains:
                log.warning("%s: %s", self._path, error.strerror)
            self._complains = False
