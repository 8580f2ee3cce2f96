"""The command line as users have it, and how a test waits for processes."""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the suite for a GPU runs tests where it need not be
    import psutil


def command(*arguments: str) -> list[str]:
    """The command line of `psyche-fast` with arguments."""
    return [sys.executable, "-m", "psyche_fast", *arguments]


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
