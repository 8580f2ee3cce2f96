"""A rank that is stopped, cut off or stuck ends the run, and is named."""

from __future__ import annotations

import json
import re
import subprocess
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch.distributed as dist

from psyche_fast.core import watch as module
from psyche_fast.core.watch import Watch
from psyche_fast.errors import explain
from psyche_fast.metrics import PhaseTimer
from psyche_fast.metrics.runs import read_run, state_of
from psyche_fast.rank.beats import STACKS, Beat, Beats, Patience, beat_key, write_stacks
from tests.groups import Command
from tests.processes import wait_until
from tests.tiny import save_llama, save_tokens


def test_patience_is_of_the_usual_step_once_that_is_known() -> None:
    patience = Patience(600)
    for _ in range(4):
        patience.took(400)
        assert patience.seconds == 600, "the first steps compile and warm up"
    for _ in range(20):
        patience.took(1)
    assert patience.seconds == 30
    for _ in range(100):
        patience.took(9)
    assert patience.seconds == 90
    for _ in range(100):
        patience.took(100)
    assert patience.seconds == 600, "never more than --timeout"
    assert Patience(8).seconds == 8


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What runs are ended with."""
    said: list[str] = []

    def exit_now(status: int, message: str) -> None:
        assert status == 1
        said.append(message)

    monkeypatch.setattr(module, "exit_now", exit_now)
    monkeypatch.setattr(module, "SECONDS", 0.05)
    return said


def watching(store: dist.Store, timer: PhaseTimer, seconds: float, logs: Path) -> Watch:
    patience = Patience(seconds)
    return Watch(store, 3, timer, patience, Patience(seconds), logs, lambda: None)


def beats(store: dist.Store, places: dict[int, tuple[int, str]], over: threading.Event) -> None:
    count = 0
    while not over.wait(0.03):
        count += 1
        for rank, place in list(places.items()):
            beat = Beat(count, *place, f"host{rank}")
            store.set(beat_key(rank), msgspec.json.encode(beat).decode())


@pytest.mark.parametrize(
    ("phase", "places", "silent", "said"),
    [
        ("train", {1: (7, "train"), 2: (6, "optimize")}, None,
         "step 7 has taken more than 1 s: rank 0 is in train, rank 2 on host2 is at step 6, "
         "optimize"),
        ("train", {1: (7, "train"), 2: (7, "train")}, None, "and so are all others"),
        ("data", {1: (7, "waiting"), 2: (7, "waiting")}, None, None),
        ("checkpoint", {1: (7, "checkpoint"), 2: (7, "checkpoint")}, None, None),
        ("data", {1: (7, "waiting"), 2: (6, "train")}, 2,
         "rank 2 on host2 has not been heard of for 1 s (it was at step 6, train): it is stopped "
         "or cut off"),
    ],
)  # fmt: skip
def test_who_is_late_is_named(
    phase: str, places: dict[int, tuple[int, str]], silent: int | None, said: str | None,
    ended: list[str], tmp_path: Path,
) -> None:  # fmt: skip
    store, timer, over = dist.HashStore(), PhaseTimer(), threading.Event()
    thread = threading.Thread(target=beats, args=(store, places, over))
    thread.start()
    try:
        watch = watching(store, timer, 1, tmp_path)
        with watch, timer.phase(phase):
            watch.begins(7)
            time.sleep(0.3)
            if silent is not None:
                del places[silent]
            deadline = time.monotonic() + (1.6 if said is None else 20)
            while not ended and time.monotonic() < deadline:
                time.sleep(0.02)
    finally:
        over.set()
        thread.join()
    if said is None:
        assert ended == []
        assert not store.check([STACKS])
    else:
        assert said in ended[0]
        assert "(--timeout)" in ended[0]
        assert "test_watch.py" in (tmp_path / "stacks-rank-0.txt").read_text()


class Lid:
    """A store of a machine that sleeps for a while, and all that is on it."""

    def __init__(self, seconds: float) -> None:
        self._store, self._seconds, self.closes = dist.HashStore(), seconds, threading.Event()
        self.set, self.get = self._store.set, self._store.get

    def check(self, keys: list[str]) -> bool:
        if self.closes.is_set():
            time.sleep(self._seconds)
            self.closes.clear()
        return bool(self._store.check(keys))


def test_the_time_in_which_a_machine_slept_is_held_against_nobody(
    ended: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "_STOPPED", 1.0)
    store: Any = Lid(2.5)
    timer = PhaseTimer()
    beat = msgspec.json.encode(Beat(1, 7, "train", "host1")).decode()
    store.set(beat_key(1), beat)
    store.set(beat_key(2), beat)
    with watching(store, timer, 2.0, tmp_path) as watch, timer.phase("train"):
        watch.begins(7)
        time.sleep(0.2)
        store.closes.set()
        wait_until(lambda: not store.closes.is_set(), 10)
        time.sleep(0.3)
        assert ended == []
        wait_until(lambda: bool(ended), 10)  # nor forgotten from then on


def test_what_a_rank_was_doing_is_no_reason_to_fail(tmp_path: Path) -> None:
    write_stacks(tmp_path / "gone", 3)
    write_stacks(tmp_path, 3)
    assert isinstance(json.loads((tmp_path / "collectives-rank-3.json").read_bytes()), dict)


def test_a_rank_without_memory_says_in_which_step_and_phase(tmp_path: Path) -> None:
    store = dist.HashStore()
    client: Any = SimpleNamespace(clone=lambda: store, asking=nullcontext)
    beats = Beats(client, 2, tmp_path)

    def runs_out() -> None:
        with beats:
            beats.at(7, "optimize")
            raise MemoryError

    with pytest.raises(MemoryError) as raised:
        runs_out()
    assert explain(raised.value).startswith("out of memory, in phase optimize of step 7, at most")
    wait_until(lambda: store.check([beat_key(2)]), 10)


@pytest.mark.processes
def test_a_stopped_rank_is_named_and_the_others_say_what_they_did(tmp_path: Path) -> None:
    save_llama(tmp_path / "model")
    save_tokens(tmp_path / "data")
    run = tmp_path / "run"
    command = Command(
        "train", "--model", str(tmp_path / "model"), "--data-path", str(tmp_path / "data"),
        "--device", "cpu", "--sequence-length", "16", "--micro-batch", "2", "--total-batch", "6",
        "--total-steps", "100000", "--param-dtype", "float32", "--threads", "1", "--distro",
        "--replicas", "3", "--compression-chunk", "16", "--output", str(run), "--timeout", "4",
    )  # fmt: skip
    metrics = run / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") > 8, 90)
    listed = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(command.pid)], capture_output=True, text=True
    )
    stopped = max(int(line) for line in listed.stdout.split())
    subprocess.run(["kill", "-STOP", str(stopped)], check=True)
    began = time.monotonic()
    assert command.wait(60) == 1
    assert time.monotonic() - began < 20
    said = command.stderr()
    # Processes are started before they have numbers. The one that is stopped leaves no stacks.
    found = re.search(r"psyche-fast: error: rank ([12]) on ", said)
    assert found is not None, said
    rank, other = int(found[1]), 3 - int(found[1])
    assert "it is stopped or cut off (--timeout)" in said
    assert "all_gather" in (run / "logs" / f"collectives-rank-{other}.json").read_text()
    # Rank 0 waits for the result; the other may have what it needs, and wait for the core.
    assert "in optimize" in (run / "logs" / "stacks-rank-0.txt").read_text()
    assert "in serve" in (run / "logs" / f"stacks-rank-{other}.txt").read_text()
    state = state_of(seen := read_run(run))
    assert state.name == "failed"
    assert state.lines[0].startswith(f"failed: rank {rank} on ")
    assert set(seen.stacks) == {"stacks-rank-0.txt", f"stacks-rank-{other}.txt"}
