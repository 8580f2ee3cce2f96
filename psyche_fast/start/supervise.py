"""`--max-restarts`: a small parent that starts a program anew when it fails. It imports no torch.

Each life is a process of its own: a fresh device context, a new store, new ports and groups.
Nothing of the one before is used but its files.
"""

from __future__ import annotations

import ctypes
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

from psyche_fast.config import FLAGS, RunConfig, flag
from psyche_fast.errors import describe_exit
from psyche_fast.start.signals import STOPS

_PR_SET_PDEATHSIG = 1
_LONGEST_PAUSE = 60.0
_USERS_MISTAKE = 2


def arguments_of(config: RunConfig) -> list[str]:
    """The flags that give a run's configuration."""
    arguments = []
    for name, value in config.to_dict().items():
        if value == FLAGS[name].default:
            continue
        if isinstance(value, bool):
            arguments.append(flag(name) if value else flag(f"no_{name}"))
        elif isinstance(value, tuple):
            arguments += [word for one in value for word in (flag(name), one)]
        else:
            arguments += [flag(name), str(value)]
    return arguments


def supervise(
    lives: Callable[[int], Sequence[str]], restarts: int, progress: Callable[[], int] | None
) -> int:
    """Runs a program until it ends well, is stopped, or fails too often.

    Not started again are the user's mistakes (status 2), and what fails twice at the same step.
    `STOPS` are passed on, and what ends after one has ended well. The program dies with this one.

    Args:
        lives: command of life number 0, 1 and so on.
        restarts: the most further lives.
        progress: the last step that was trained; None where nobody knows.

    Returns:
        The exit status for this process: the last life's, 128 and its number for a signal.
    """
    wanted = threading.Event()
    child: subprocess.Popen[bytes] | None = None

    def stop(number: int, frame: Any) -> None:
        wanted.set()
        if child is not None:
            child.send_signal(number)

    for number in STOPS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, stop)
    prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None

    def die_with_parent() -> None:
        if prctl is not None:
            prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    failed_at: int | None = None
    for life in range(restarts + 1):
        child = subprocess.Popen(
            lives(life),
            preexec_fn=die_with_parent,
            # Ctrl-C in a terminal reaches this process alone, which passes it on once.
            process_group=0,
        )
        if wanted.is_set():  # between two lives
            child.send_signal(signal.SIGTERM)
        code = child.wait()
        status = 128 - code if code < 0 else code
        if code == 0 or wanted.is_set() or code == _USERS_MISTAKE:
            return status
        step = None if progress is None else progress()
        how = describe_exit(code)
        if step is not None and step == failed_at:
            _say(f"{how}, again after step {step}: it would fail a third time")
            return status
        if life == restarts:
            _say(f"{how}; --max-restarts {restarts} are used up")
            return status
        failed_at = step
        pause = min(2.0**life, _LONGEST_PAUSE) * random.uniform(0.5, 1.0)
        after = "" if step is None else f" after step {step}"
        _say(f"{how}{after}; start {life + 2} of at most {restarts + 1} in {pause:.1f} s")
        if wanted.wait(pause):
            return status
    raise AssertionError("the last life returns")


def _say(text: str) -> None:
    print(f"psyche-fast: {text}", file=sys.stderr, flush=True)
