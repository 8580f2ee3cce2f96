"""Signals that end a run, and what is done on the way out."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from psyche_fast.start.signals import STOPS, stop_on_signal


def test_watching_leaves_no_descriptor_no_thread_and_no_handler() -> None:
    process = psutil.Process()
    before, threads = process.num_fds(), threading.active_count()
    handlers = [signal.getsignal(number) for number in STOPS]
    with stop_on_signal(print, lambda: None):
        assert process.num_fds() > before
    assert process.num_fds() == before
    assert threading.active_count() == threads
    assert [signal.getsignal(number) for number in STOPS] == handlers


@pytest.mark.parametrize("number", STOPS)
def test_the_first_signal_asks_for_the_end(number: signal.Signals) -> None:
    said: list[str] = []
    heard = threading.Event()

    def message(text: str) -> None:
        said.append(text)
        heard.set()

    with stop_on_signal(message, lambda: None) as stop:
        stop.has_work = True
        os.kill(os.getpid(), number)
        assert heard.wait(20)
        assert stop.signal == number
    assert said[0].startswith(f"{number.name}: stopping within two steps, with a checkpoint")


def test_what_is_ignored_stays_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup has it
    try:
        with stop_on_signal(print, lambda: None):
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


SECOND = """
import os, signal, sys, threading, time
from psyche_fast.start.signals import also_at_exit_now, stop_on_signal

first = threading.Event()
with (
    stop_on_signal(lambda text: first.set(), lambda: print("killed", flush=True)) as stop,
    also_at_exit_now(lambda: print("finished", flush=True)),
    also_at_exit_now(lambda: 1 / 0),
):
    stop.has_work = True
    os.kill(os.getpid(), signal.Signals[sys.argv[1]])
    first.wait()
    os.kill(os.getpid(), signal.Signals[sys.argv[2]])
    time.sleep(float(sys.argv[3]))
print("went on")
"""


def twice(one: str, two: str, seconds: float) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SECOND, one, two, str(seconds)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


@pytest.mark.parametrize(("one", "two"), [("SIGINT", "SIGINT"), ("SIGUSR1", "SIGTERM")])
def test_a_second_one_ends_at_once_and_finishes_what_is_registered(one: str, two: str) -> None:
    done = twice(one, two, 100)
    assert done.returncode == 128 + signal.Signals[two]
    assert done.stdout.split() == ["killed", "finished"]
    assert done.stderr == "psyche-fast: stopped at once, without a checkpoint\n"


def test_a_closed_terminal_may_be_told_twice() -> None:
    done = twice("SIGHUP", "SIGHUP", 0.5)
    assert (done.returncode, done.stdout) == (0, "went on\n"), done.stderr


LOGGED = """
import ctypes, logging, os, sys
from pathlib import Path
from psyche_fast.start.logs import rank_log

def native(text):  # as a C++ library writes, past Python
    os.write(2, text)
    os.write(1, text)

try:
    with rank_log(Path(sys.argv[1]), rank=3):
        logging.getLogger("psyche_fast.x").info("ours")
        native(b"[E1 c10d] theirs\\n")
        print("shown")
        print("shown too", file=sys.stderr)
        if sys.argv[2] == "raise":
            raise ValueError("a user's mistake")
        if sys.argv[2] == "abort":
            os.abort()
except ValueError as error:
    print(error)
native(b"after\\n")
"""


def logged(path: Path, how: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", LOGGED, str(path), how]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


def test_libraries_write_to_the_log_and_python_to_the_terminal(tmp_path: Path) -> None:
    path = tmp_path / "rank-3.log"
    path.write_text("of an earlier part of the run\n")
    done = logged(path, "raise")
    assert done.stdout == "shown\na user's mistake\nafter\n"
    assert done.stderr == "shown too\nafter\n"
    first, ours, *rest = path.read_text().splitlines()
    assert first == "of an earlier part of the run"
    assert ours.endswith("rank 3 INFO ours")
    assert rest[:2] == ["[E1 c10d] theirs"] * 2
    assert rest[2].endswith("rank 3 INFO where it happened:")
    assert rest[-1] == "ValueError: a user's mistake"


def test_a_process_that_a_library_aborts_says_so_on_the_terminal(tmp_path: Path) -> None:
    done = logged(tmp_path / "log", "abort")
    assert done.returncode == -signal.SIGABRT
    assert "Fatal Python error: Aborted" in done.stderr
    assert "theirs" not in done.stderr
