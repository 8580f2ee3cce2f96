"""Replicas of an elastic run on the core's machine that end, and whose end is the run's."""

from __future__ import annotations

import subprocess

import pytest

from psyche_fast.start.elastic import ReplicaSidecars
from psyche_fast.start.spawn import Child
from tests.processes import wait_until


def child(rank: int, *command: str) -> Child:
    return Child(rank, subprocess.Popen(command), None, 0)


@pytest.mark.parametrize(
    ("has_begun", "dead", "other", "fatal"),
    [
        (True, 2, 3, False),
        (True, 1, 0, True),  # rank 0's own replica
        (False, 2, 3, True),  # what cannot be loaded would not be the second time either
    ],
)
def test_whose_end_is_the_runs(has_begun: bool, dead: int, other: int, fatal: bool) -> None:
    sidecars = ReplicaSidecars("gloo", "tcp://127.0.0.1:1", 6, size=2)
    life = sidecars.life(dead // 2)
    beside, elsewhere = child(other, "sleep", "60"), child(4, "sleep", "60")
    with sidecars:
        sidecars._children += [child(dead, "sh", "-c", "exit 3"), beside, elsewhere]
        sidecars.has_begun = has_begun
        sidecars.watch(grace=60)
        if fatal:
            said = sidecars.failure(20)
            assert said is not None
            assert said.startswith(f"rank {dead} (pid ")
            assert said.endswith("ended: exit status 3")
            assert sidecars.gone() == {}
            return
        wait_until(lambda: bool(sidecars.gone()), 20)
        assert sidecars.gone() == {(1, life): "rank 2: exit status 3"}
        assert beside.process.poll() == -9, "a replica's ranks end together"
        assert elsewhere.process.poll() is None
        assert sidecars.failure(0.2) is None
