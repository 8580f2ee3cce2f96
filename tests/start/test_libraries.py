"""Threads of OpenMP stay awake where more are counted than there are cores."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from psyche_fast.start.libraries import stay_awake

ROOT = Path(__file__).resolve().parents[2]


def run(
    program: str, *arguments: str, folder: Path = ROOT, **variables: str
) -> subprocess.CompletedProcess[str]:
    """A program, without what this process' environment has of these libraries."""
    of = "OMP_", "GOMP_", "KMP_", "MALLOC_", "GLIBC_"
    rest = {k: v for k, v in os.environ.items() if not k.startswith(of)}
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=folder,
        env={**rest, "PYTHONPATH": str(ROOT), **variables},
        capture_output=True, text=True, check=True,
    )  # fmt: skip


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
def test_it_is_decided_before_torch_is_there(program: str, tmp_path: Path) -> None:
    done = run(program, folder=tmp_path)  # where `schedule` draws
    assert done.stdout.splitlines()[-1] == "active 300000"


_TOLD = """
import os
from psyche_fast.start.libraries import stay_awake
stay_awake(os.environ)
import torch
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of GCC's OpenMP")
def test_openmp_takes_it_up() -> None:
    """Else loops of 64k elements take nine times as long after an all-gather over gloo."""
    done = run(_TOLD, OMP_DISPLAY_ENV="verbose")
    assert "OMP_WAIT_POLICY = 'ACTIVE'" in done.stderr
    assert "GOMP_SPINCOUNT = '300000'" in done.stderr


_STEPS = """
import os, resource, sys
from psyche_fast.start.libraries import keep_freed_memory
assert keep_freed_memory(os.environ) == (sys.argv[1] == "keep")
import torch

def step():
    for _ in range(4):
        torch.ones(12 << 20).add_(1)  # 48 MiB

step(), step()  # the first lays out what there is
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of glibc")
def test_what_a_step_frees_is_there_for_the_next() -> None:
    def faults(how: str) -> int:
        own = {} if how == "keep" else {"MALLOC_ARENA_MAX": "8"}
        done = run(_STEPS, how, **own)
        return int(done.stdout)

    assert faults("keep") < 1000 < 10_000 < faults("give back")
