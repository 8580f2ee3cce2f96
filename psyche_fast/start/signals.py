"""Ctrl-C and SIGTERM: the first ends the run after what was sent, the second at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


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
    """Watches for SIGINT and SIGTERM while the run lasts.

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
    handled = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda *_: None) for number in handled}
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def watch() -> None:
        while data := os.read(reader, 1):
            number = data[0]
            if number not in handled:
                continue
            if request.signal is None and request.has_work:
                request.signal = number
                message(
                    f"{signal.Signals(number).name}: stopping within two steps, with a checkpoint; "
                    "once more stops at once"
                )
                continue
            kill()
            sys.stderr.write("psyche-fast: stopped at once, without a checkpoint\n")
            sys.stderr.flush()
            os._exit(128 + number)

    threading.Thread(target=watch, daemon=True, name="signals").start()
    try:
        yield request
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(writer)
