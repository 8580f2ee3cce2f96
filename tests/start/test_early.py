"""Sidecars that were started before the core knew what to tell them."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from unittest import mock

import pytest

from psyche_fast.errors import SidecarFailed
from psyche_fast.start import early
from psyche_fast.start.early import Early
from psyche_fast.start.spawn import Sidecars
from tests.groups import fork_ranks, in_process

THREADS = "OMP_NUM_THREADS"


def waiter(argv: list[str]) -> None:
    """What stands for a sidecar: says something, waits, and says what it was told."""
    assert argv[0] == early.FLAG
    time.sleep(0.2)  # in which the core tells it what to do
    print("before", flush=True)
    if os.environ.get("FAILS"):
        print("no memory to import torch", file=sys.stderr, flush=True)
        sys.exit(1)
    words = early.wait(int(argv[1]), lambda: None)
    print(*words, os.environ["TOLD"], os.environ.get("FROM_BEFORE"), flush=True)
    print("an error", file=sys.stderr, flush=True)
    assert sys.stdin is None or os.read(0, 1) == b""


def _forked() -> None:
    fork_ranks({"psyche_fast.sidecar": f"{__name__}:waiter"})


def _is_gone(pid: int) -> bool:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.02)
    return False


def _taken(log: Path) -> tuple[str, list[str]]:
    _forked()
    log.write_text("of an earlier run\n")
    with mock.patch.dict(os.environ, {THREADS: "1", "FROM_BEFORE": "1"}):
        one = Early("1")
        one.start()
        del os.environ["FROM_BEFORE"]
        sidecars = Sidecars("gloo", "tcp://127.0.0.1:9", 2, {"TOLD": "told"}, early=one)
        sidecars.spawn(1, None, log)
        (child,) = sidecars._children
        assert child.log_start == len("of an earlier run\n")
        sidecars.join(20)
    return log.read_text(), child.process.args[2:4]  # type: ignore[index, return-value]


@pytest.mark.processes
def test_one_that_is_taken_becomes_the_rank_it_is_told_to_be(tmp_path: Path) -> None:
    text, command = in_process(_taken, tmp_path / "log")
    assert command == ["psyche_fast.sidecar", early.FLAG]
    before, begun, told, error = text.splitlines()
    assert (before, begun, error) == ("of an earlier run", "before", "an error")
    assert told.endswith("--init-method tcp://127.0.0.1:9 --world-size 2 --rank 1 told None")


def _fails(log: Path) -> str:
    _forked()
    with mock.patch.dict(os.environ, {THREADS: "1", "FAILS": "1"}):
        one = Early("1")
        one.start()
        sidecars = Sidecars("gloo", "tcp://127.0.0.1:9", 2, early=one)
        sidecars.spawn(1, None, log)
    with pytest.raises(SidecarFailed) as error, sidecars:
        sidecars.wait()
    return str(error.value)


@pytest.mark.processes
def test_one_that_fails_before_it_has_a_log_is_heard(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert "no memory to import torch" in in_process(_fails, log)
    assert log.read_text() == "before\nno memory to import torch\n"


def _not_taken() -> None:
    _forked()
    with early.early(3, 4, "cpu", threads=2) as one:
        first, second, third = (waiting.process for waiting in one._waiting)
        # The plan decided for another number of threads than was foreseen: none of them will do.
        third.kill()
        third.wait()
        taken = one.take({THREADS: "2"})
        assert taken is not None
        assert taken.process is second, "one that has ended is passed over"
        assert one.take({THREADS: "3"}) is None
        assert first.poll() is not None
        taken.process.kill()
        taken.process.wait()
    with early.early(1, 2, "cpu", threads=0) as one:
        (waiting,) = one._waiting
    assert waiting.process.poll() is not None
    with early.early(0, 1, "cpu", threads=0) as none:
        assert none.take({}) is None


@pytest.mark.processes
def test_those_that_do_not_fit_or_are_not_needed_are_ended() -> None:
    in_process(_not_taken)


def _core() -> int:
    _forked()
    one = Early("1")
    one.start()
    return one._waiting[0].process.pid


@pytest.mark.processes
def test_one_whose_core_has_gone_ends() -> None:
    assert _is_gone(in_process(_core))


@pytest.mark.parametrize(
    ("device", "threads", "ranks", "gpus", "expected"),
    [
        ("cpu", 0, 2, True, "4"),
        ("auto", 0, 2, False, "4"),
        ("auto", 0, 2, True, "6"),  # what the environment says
        ("auto", 3, 2, True, "3"),
        ("cpu", 0, 16, False, "1"),
    ],
)
def test_threads_are_those_that_the_plan_will_decide(
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    threads: int,
    ranks: int,
    gpus: bool,
    expected: str,
) -> None:
    monkeypatch.setenv(THREADS, "6")
    monkeypatch.setattr(early, "cores", lambda: 8)
    monkeypatch.setattr(Path, "glob", lambda self, pattern: [Path("/dev/nvidia0")] * gpus)
    with early.early(0, ranks, device, threads) as one:
        assert one.threads == expected
