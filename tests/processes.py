"""Looking at processes of a run."""

from __future__ import annotations

import psutil


def is_there(process: psutil.Process) -> bool:
    """Whether a process runs; one that only nobody has waited for yet does not."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
