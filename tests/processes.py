"""Processes that are started as users start them, and how a test waits for them."""

from __future__ import annotations

import ctypes
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the suite for a GPU runs tests where it need not be
    import psutil

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)  # opened here: not between fork and exec
_started: list[subprocess.Popen[str]] = []


def command(*arguments: str) -> list[str]:
    """The command line of `psyche-fast` with arguments."""
    return [sys.executable, "-m", "psyche_fast", *arguments]


def start(words: Sequence[str], **options: Any) -> subprocess.Popen[str]:
    """Starts a process that outlives neither the test that started it nor this process.

    Args:
        words: its command line.
        **options: of `Popen`; `stderr` is a pipe, and streams are text, unless they say otherwise.
    """
    options = {"stderr": subprocess.PIPE, "text": True, **options}
    process = subprocess.Popen(words, preexec_fn=_die_with_parent, **options)
    _started.append(process)
    return process


def end_all() -> None:
    """Ends what a test has started and left; conftest.py calls it after each."""
    while _started:
        with _started.pop() as process:  # which closes its pipes and waits
            process.kill()


def _die_with_parent() -> None:
    if sys.platform == "linux":
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Returns once a condition holds.

    Raises:
        AssertionError: it has not come to hold in time.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not so after {seconds:g} s"
        time.sleep(0.02)


def is_there(process: psutil.Process) -> bool:
    """Whether a process runs; one that only nobody has waited for yet does not."""
    import psutil

    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def seconds_until_gone(process: psutil.Process, most: float = 5.0) -> float:
    """How long a process goes on from now; gives up after `most` seconds."""
    started = time.monotonic()
    while is_there(process) and time.monotonic() - started < most:
        time.sleep(0.02)
    return time.monotonic() - started
