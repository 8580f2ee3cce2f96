"""Phase times and memory."""

from __future__ import annotations

import json
import mmap
import subprocess
import sys

import pytest
import torch

from psyche_fast.metrics import PhaseTimer, memory_bytes


class Clock:
    """A clock that moves only when told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_phases_add_up_and_start_again_after_take():
    clock = Clock()
    timer = PhaseTimer(clock)
    for seconds in (1.0, 2.0):
        with timer.phase("data"):
            clock.now += seconds
        clock.now += 0.5  # between phases: charged to none
    with timer.phase("optimizer"):
        clock.now += 4.0
    assert timer.take() == {"data": 3.0, "optimizer": 4.0}
    assert timer.take() == {}


def test_an_inner_phase_is_not_counted_twice():
    clock = Clock()
    timer = PhaseTimer(clock)
    with timer.phase("step"):
        clock.now += 1.0
        with timer.phase("exchange"):
            clock.now += 2.0
            with timer.phase("step"):
                clock.now += 4.0
        clock.now += 8.0
    assert timer.take() == {"step": 13.0, "exchange": 2.0}


def test_take_inside_a_phase_splits_it():
    clock = Clock()
    timer = PhaseTimer(clock)
    with timer.phase("train"):
        clock.now += 1.0
        assert timer.take() == {"train": 1.0}
        clock.now += 2.0
    assert timer.take() == {"train": 2.0}


def test_a_phase_that_raises_is_charged_and_closed():
    clock = Clock()
    timer = PhaseTimer(clock)

    def fail():
        with timer.phase("data"):
            clock.now += 1.0
            raise KeyError("gone")

    with pytest.raises(KeyError, match="gone"):
        fail()
    clock.now += 5.0
    assert timer.take() == {"data": 1.0}


def test_process_memory_grows_by_what_is_held_and_the_peak_stays():
    before = memory_bytes("cpu")
    size = 64 * 2**20
    held = mmap.mmap(-1, size)  # fresh pages, which an allocator may have already
    for page in range(0, size, mmap.PAGESIZE):
        held[page] = 1
    during = memory_bytes("cpu")
    held.close()
    after = memory_bytes()
    assert set(before) == {"process", "process_peak"}
    assert during["process"] - before["process"] > 0.9 * size
    # The kernel updates the two counters at different moments, up to some pages apart.
    assert after["process_peak"] >= during["process"] - 2**20
    assert after["process"] < during["process"] - 0.9 * size


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_is_this_process_s_own_and_not_its_parent_s():
    # ru_maxrss survives exec: the child of a process with 256 MiB would report 256 MiB.
    held = bytearray(256 * 2**20)
    held[::4096] = b"x" * len(held[::4096])
    script = (
        "from psyche_fast.metrics.memory import memory_bytes; "
        "import json; print(json.dumps(memory_bytes()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    assert json.loads(done.stdout)["process_peak"] < 200 * 2**20


@pytest.mark.gpu
def test_cuda_peaks_count_what_was_allocated():
    torch.cuda.reset_peak_memory_stats()
    before = memory_bytes("cuda")["cuda_peak_allocated"]
    held = torch.zeros(2**20, device="cuda")
    memory = memory_bytes(torch.device("cuda"))
    assert memory["cuda_peak_allocated"] - before >= held.nbytes
    assert memory["cuda_peak_reserved"] >= memory["cuda_peak_allocated"]


def test_an_error_says_in_which_phase_it_was_raised() -> None:
    timer = PhaseTimer()
    with pytest.raises(MemoryError) as raised, timer.phase("train"), timer.phase("data"):
        raise MemoryError
    assert raised.value.__notes__ == ["in phase data"]
