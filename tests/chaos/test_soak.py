"""Runs that are killed, stopped, filled up and damaged at random lose nothing: `soak.py`."""

from __future__ import annotations

import os

import pytest

from tests.chaos.soak import WORLDS, soak

SECONDS = float(os.environ.get("PSYCHE_FAST_CHAOS_SECONDS", "12"))
"""That each of the runs is disturbed."""
SHORT = ["elastic"]
"""Of the worlds, the one in which most can go wrong; by hand all of them, for longer."""


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.timeout(300 + 4 * SECONDS)
@pytest.mark.parametrize("world", SHORT if SECONDS < 60 else WORLDS)
def test_nothing_is_lost_and_nothing_is_left(world: str) -> None:
    report = soak(world, SECONDS, seed=int(os.environ.get("PSYCHE_FAST_CHAOS_SEED", "15")))
    assert sum(report.faults.values()) > 1
    assert report.lives > 0
