"""Benchmarks of whole runs, in a short form: a run hides what it says over a slow link."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from benchmarks import bench_overlap, bench_save, bench_train_step, bench_wan
from tests.groups import Command, in_process, run_processes


@pytest.mark.slow
@pytest.mark.processes
def test_the_exchange_hides_behind_the_next_step() -> None:
    found = bench_overlap.measure(
        run_processes,
        mbit=100.0, latency_ms=50.0, width=256, layers=4, length=128, micro=4, steps=4,
    )  # fmt: skip
    assert found["no overlap"]["exposed_ms"]["p50"] > 40
    # However busy the machine is: a step that takes longer than the link hides more of it.
    assert found["overlap"]["exposed_ms"]["p50"] < 25
    assert found["overlap"]["bytes"] > 0


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("ip") is None or not Path("/dev/net/tun").exists(),
    reason="needs root, iproute2 and /dev/net/tun",
)
def test_a_step_over_a_slow_link_takes_a_few_round_trips_at_most() -> None:
    found = bench_wan.measure(
        (2,), lambda host, *words: Command(*words, host=host),
        mbit=100.0, latency_ms=50.0, width=64, layers=1, length=32, micro=1, steps=8,
    )  # fmt: skip
    free, slow = (found["step_ms"]["2"][link]["p50"] for link in ("no link", "link"))
    # The step itself takes a few ms. What every step waits for in turn would be 13 round trips;
    # what runs beside the steps is an exchange of results and an addition of counts.
    assert slow - free < 5 * 100


@pytest.mark.slow
@pytest.mark.processes
def test_a_step_hardly_waits_for_a_checkpoint(tmp_path: Path) -> None:
    """Which is 1 % and less on a machine with nothing else to do, and of larger models."""
    bench_save.prepare(tmp_path, 64)
    found = in_process(bench_save.measure, tmp_path, 1)
    assert 0 < found["share"] < 0.5
    assert found["state_bytes"] > 3 * found["model_bytes"] > 0


@pytest.mark.slow
@pytest.mark.processes
def test_a_step_is_that_of_a_plain_loop() -> None:
    found = in_process(bench_train_step.compare, bench_train_step.WARMUP + 2)
    assert found["largest_loss_difference"] < 1e-3
    assert found["ratio"]["p50"] > 0
