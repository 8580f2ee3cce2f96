"""A sidecar ends with its core. Nothing here imports torch.

A sidecar must never outlive its core. Three mechanisms, each measured: the kernel's death signal
and the end of a pipe act at once, where our own core is the parent; the poll of ``--parent-pid``
takes up to 0.2 s and serves any parent. The death signal also fires when the *thread* that
spawned the child ends, so it is used only where our core, which spawns from its main thread, asks.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time

import psutil

PARENT_PIPE = "PSYCHE_FAST_PARENT_PIPE"
"""Environment variable: the number of an inherited descriptor that ends when the core does."""
TIMEOUT = "PSYCHE_FAST_TIMEOUT"
"""Environment variable: seconds until a collective that a rank misses is an error."""

_POLL_SECONDS = 0.2
_PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int) -> None:
    """Ends this process, whatever it is doing, soon after the process ``parent_pid`` is gone."""
    pipe = os.environ.pop(PARENT_PIPE, None)
    if pipe is not None:
        if sys.platform == "linux":
            ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        _start(_until_end_of_pipe, int(pipe))
    if not _alive(parent_pid):
        os._exit(1)
    _start(_until_gone, parent_pid)


def _start(target: object, argument: int) -> None:
    threading.Thread(target=target, args=(argument,), daemon=True, name="parent-watch").start()  # type: ignore[arg-type]


def _until_end_of_pipe(descriptor: int) -> None:
    while os.read(descriptor, 1):
        pass
    os._exit(1)


def _until_gone(parent_pid: int) -> None:
    while _alive(parent_pid):
        time.sleep(_POLL_SECONDS)
    os._exit(1)


def _alive(pid: int) -> bool:
    if os.getppid() == pid:
        return True
    try:
        # A killed parent that nobody has waited for stays as a zombie.
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
