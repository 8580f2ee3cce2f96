"""The benchmark of the exchange over a slow link, in a short form: overlap hides the link."""

from __future__ import annotations

import pytest

from benchmarks import bench_overlap


@pytest.mark.slow
def test_the_exchange_hides_behind_the_next_step() -> None:
    found = bench_overlap.measure(
        mbit=100.0, latency_ms=50.0, width=256, layers=4, length=128, micro=4, steps=4
    )
    assert found["no overlap"]["exposed_ms"]["p50"] > 40
    # However busy the machine is: a step that takes longer than the link hides more of it.
    assert found["overlap"]["exposed_ms"]["p50"] < 25
    assert found["overlap"]["bytes"] > 0
