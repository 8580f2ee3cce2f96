"""A sidecar ends with its core. This module imports no torch.

A sidecar must never outlive its core. The kernel's death signal acts at once, where our own core is
the parent; the poll of `--parent-pid` takes up to 0.2 s and serves any parent. The death signal
also fires when the *thread* that spawned the child ends, so it is used only where our core, which
spawns from its main thread, asks for it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from datetime import timedelta

import psutil

SPAWNED = "PSYCHE_FAST_SPAWNED"
"""Environment variable: set where our own core, or `psyche-fast sidecar`, is the parent."""
LIFE = "PSYCHE_FAST_LIFE"
"""Environment variable: in an elastic run, which life of its replica a rank is of."""
TIMEOUT = "PSYCHE_FAST_TIMEOUT"
"""Environment variable: seconds until a collective that a rank misses is an error."""

_POLL_SECONDS = 0.2
_PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int) -> None:
    """Ends this process, whatever it is doing, soon after the process `parent_pid` is gone."""
    if os.environ.pop(SPAWNED, None) and sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if not _alive(parent_pid):
        os._exit(1)
    watch = threading.Thread(target=_until_gone, args=(parent_pid,), daemon=True)
    watch.start()


def start_process_watcher(pid: int, duration: timedelta) -> None:
    """Ends this process soon after the process `pid` is gone, which is looked at each `duration`.

    Psyche's core calls a function of this name so.
    """
    seconds = duration.total_seconds()
    threading.Thread(target=_until_gone, args=(pid, seconds), daemon=True).start()


def _until_gone(parent_pid: int, seconds: float = _POLL_SECONDS) -> None:
    while _alive(parent_pid):
        time.sleep(seconds)
    os._exit(1)


def _alive(pid: int) -> bool:
    if os.getppid() == pid:
        return True
    try:
        # A killed parent that nobody has waited for stays as a zombie.
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
