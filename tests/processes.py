"""Looking at processes of a run."""

from __future__ import annotations

import time

import psutil


def is_there(process: psutil.Process) -> bool:
    """Whether a process runs; one that only nobody has waited for yet does not."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def seconds_until_gone(process: psutil.Process, most: float = 5.0) -> float:
    """How long a process goes on from now; gives up after ``most`` seconds."""
    started = time.monotonic()
    while is_there(process) and time.monotonic() - started < most:
        time.sleep(0.02)
    return time.monotonic() - started
