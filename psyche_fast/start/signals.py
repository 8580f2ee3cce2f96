"""Ends of a run before its time: by signals, or at once from a thread.

The first signal ends a run after what was sent, with a checkpoint, the second at once: Ctrl-C,
SIGTERM, a closed terminal (SIGHUP), and SIGUSR1, by which Slurm says that time is nearly up
(`--signal=USR1@120`). It may send them to every process of a job: only the core acts on them.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""Signals that end a run with a checkpoint; SIGINT and SIGTERM, coming second, end it at once."""
_EXIT_SECONDS = 5.0
"""How long `exit_now` waits for what has been registered."""

_at_exit: list[Callable[[], None]] = []


@contextmanager
def also_at_exit_now(action: Callable[[], None]) -> Iterator[None]:
    """Has `exit_now` call `action` while the block runs."""
    _at_exit.append(action)
    try:
        yield
    finally:
        _at_exit.remove(action)


def exit_now(status: int, message: str) -> NoReturn:
    """Ends the process from a thread, where the main one may be stuck in a collective.

    Args:
        status: of the process.
        message: one line for the user.
    """

    def finish() -> None:
        for action in list(_at_exit):
            with suppress(Exception):  # the process ends anyway, and has said why
                action()

    with suppress(OSError):  # a terminal that has been closed
        sys.stderr.write(f"psyche-fast: {message}\n")
        sys.stderr.flush()
    thread = threading.Thread(target=finish, daemon=True, name="ending")
    thread.start()
    thread.join(_EXIT_SECONDS)
    os._exit(status)


def leave_to_core() -> None:
    """Ignores `STOPS`: the core acts on them, and ends this rank in order or takes it along."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)


class StopRequest:
    """Whether the user wants the run to end, and by which signal."""

    def __init__(self) -> None:
        """Nothing is wanted yet."""
        self.signal: int | None = None
        self.has_work = False
        """Whether there is something to save; until then one signal ends the run at once."""


@contextmanager
def stop_on_signal(
    message: Callable[[str], None], kill: Callable[[], None]
) -> Iterator[StopRequest]:
    """Watches for `STOPS` while the run lasts, but for those that are ignored (nohup).

    A Python handler waits for the C++ call in hand, a collective for instance; the wake-up
    descriptor is written by the C handler at once, and a thread reads it.

    Args:
        message: how to tell the user.
        kill: ends the sidecars, for the second signal.

    Yields:
        What has been asked for.
    """
    request = StopRequest()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    handled = [number for number in STOPS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, lambda *_: None) for number in handled}
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def watch() -> None:
        while data := os.read(reader, 1):
            number = data[0]
            if number not in handled:
                continue
            if request.signal is not None and number in (signal.SIGHUP, signal.SIGUSR1):
                continue  # shell and kernel may both tell of the same closed terminal
            if request.signal is None and request.has_work:
                request.signal = number
                message(
                    f"{signal.Signals(number).name}: stopping within two steps, with a checkpoint; "
                    "once more stops at once"
                )
                continue
            kill()
            exit_now(128 + number, "stopped at once, without a checkpoint")

    thread = threading.Thread(target=watch, daemon=True, name="signals")
    thread.start()
    try:
        yield request
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(writer)  # which ends the thread
        thread.join()
        os.close(reader)
