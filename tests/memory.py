"""How much memory of its own this process comes to hold: what the kernel counts, sampled."""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

SLACK = 28 << 20
"""Bytes that the interpreter, gloo (most with many groups of ranks) and threads take on the way."""

needs_proc = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="reads Linux's /proc"
)
_M_MMAP_THRESHOLD = -3
_EVERY = 0.0005


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    raise AssertionError(f"no {name}")


def anonymous() -> int:
    """Bytes that are this process's own; pages of mapped files are the kernel's to drop."""
    return _status("RssAnon")


def forget_peak() -> None:
    """Has the kernel note this process's peak anew, for `anonymous_peak`."""
    Path("/proc/self/clear_refs").write_text("5")


def anonymous_peak() -> int:
    """The most `anonymous` bytes since `forget_peak`, in a block in which no file is mapped."""
    return _status("VmHWM") - (_status("VmRSS") - _status("RssAnon"))


def give_back_at_once() -> None:
    """From now on, what is freed goes back: glibc would keep pieces of up to 32 MB."""
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, 1 << 18)
    gc.collect()
    libc.malloc_trim(0)


@contextmanager
def peak() -> Iterator[list[int]]:
    """Measures the most that is held inside, beyond what was held before: the list's one number."""
    before = anonymous()
    found, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(_EVERY):
            found[0] = max(found[0], anonymous() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()
