"""Ends of the whole process from a thread, where the main thread may be stuck in a collective."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

_SECONDS = 5.0
"""How long an end waits for all that is still to be done."""

_last: list[Callable[[], None]] = []


@contextmanager
def also_at_exit_now(action: Callable[[], None]) -> Iterator[None]:
    """Has `exit_now` call `action` while the block runs."""
    _last.append(action)
    try:
        yield
    finally:
        _last.remove(action)


def exit_now(status: int, message: str) -> NoReturn:
    """Says one line and ends the process; what has been registered gets a few seconds before that.

    Args:
        status: of the process.
        message: for the user.
    """
    with suppress(OSError):  # a terminal that has been closed
        sys.stderr.write(f"psyche-fast: {message}\n")
        sys.stderr.flush()
    actions = threading.Thread(target=_do, args=(list(_last),), daemon=True, name="ending")
    actions.start()
    actions.join(_SECONDS)
    os._exit(status)


def _do(actions: list[Callable[[], None]]) -> None:
    for action in actions:
        with suppress(Exception):  # the process ends anyway, and has said why
            action()
