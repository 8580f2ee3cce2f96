"""Threads of OpenMP stay awake where more are counted than there are cores."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from psyche_fast.start.openmp import stay_awake


def test_what_a_user_has_set_stays() -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        environment = {name: "7"}
        assert not stay_awake(environment)
        assert environment == {name: "7"}


_COMMAND = """
import os, sys
from psyche_fast import cli
cli.main(["schedule", "--total-steps", "2", "--warmup-steps", "1"])
assert "torch" not in sys.modules, "then it is too late"
print(os.environ["OMP_WAIT_POLICY"], os.environ["GOMP_SPINCOUNT"])
"""
_SIDECAR = """
import os, sys
from psyche_fast import sidecar
def run(args):
    assert "torch" not in sys.modules, "then it is too late"
    print(os.environ["OMP_WAIT_POLICY"], os.environ["GOMP_SPINCOUNT"])
sidecar.run = run
sidecar.main("--backend gloo --init-method tcp://h:1 --world-size 2 --rank 1".split())
"""


@pytest.mark.parametrize("program", [_COMMAND, _SIDECAR])
def test_it_is_decided_before_torch_is_there(program: str) -> None:
    rest = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", program], env=rest, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "active 300000"


_GATHER = """
import os, statistics, sys, tempfile, time
from psyche_fast.start.openmp import stay_awake
if sys.argv[1] == "awake":
    stay_awake(os.environ)
import torch
import torch.distributed as dist

def microseconds():
    x, times = torch.zeros(1 << 16), []
    for _ in range(300):
        began = time.perf_counter()
        x.add_(1)
        times.append(1e6 * (time.perf_counter() - began))
    return statistics.median(times)

torch.set_num_threads(len(os.sched_getaffinity(0)))
with tempfile.TemporaryDirectory() as folder:
    dist.init_process_group("gloo", init_method=f"file://{folder}/s", rank=0, world_size=1)
    before = microseconds()
    for _ in range(8):
        dist.all_gather_into_tensor(torch.zeros(1 << 20), torch.zeros(1 << 20))
    print(microseconds() / before)
    dist.destroy_process_group()
"""


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or len(os.sched_getaffinity(0)) < 2,
    reason="wants several cores, and GCC's OpenMP",
)
def test_loops_after_a_gather_are_as_short_as_before() -> None:
    """Without it they took four times as long; the least of some trials, for what else runs."""
    rest = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_"))}

    def ratio(how: str) -> float:
        done = subprocess.run(
            [sys.executable, "-c", _GATHER, how],
            env=rest, capture_output=True, text=True, check=True,
        )  # fmt: skip
        return float(done.stdout.splitlines()[-1])

    assert min(ratio("awake") for _ in range(3)) < 2
