"""A step of each method on a CPU against the reference implementation's own.

    python benchmarks/bench_methods.py --references FOLDER      # table; --out FILE writes JSON
    PSYCHE_FAST_REFERENCES=FOLDER python -m pytest benchmarks/bench_methods.py

FOLDER holds checkouts of CCLoco (tplr-ai), torchft (pytorch), MuLoCo (facebookresearch), DeMo
(bloc97) and DeToNATION (schneiderkamplab), each under its name; they want einops. What is not there
is left out and named. The reference of `torch.optim` is in torch.

A step is all between the last backward, or local step, and the parameters of the next forward, for
one replica alone, on the same parameters and gradients: what is sent is made, checked and applied.
The two sides take turns in one process, some steps each.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

if __name__ == "__main__":  # run as a script from a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import method_references as references
from benchmarks.common import copy_bandwidth, environment, percentiles, write_json
from benchmarks.method_references import (
    DECAY,
    OUTER_MOMENTUM,
    OUTER_RATE,
    RATE,
    Model,
    Side,
)
from psyche_fast import methods as m
from psyche_fast.bench.shapes import SETS, elements
from psyche_fast.methods.muon import MuonAdamW
from psyche_fast.start.libraries import stay_awake

SHAPES = SETS["small"]
THREADS = 2
ENVIRONMENT = "PSYCHE_FAST_REFERENCES"
ASKED = 3.0
"""How many times faster than the reference a step has to be."""

_NESTEROV = m.Nesterov(rate=OUTER_RATE, momentum=OUTER_MOMENTUM)


@dataclass(frozen=True)
class Comparison:
    """A method of ours, and what it is compared with.

    Attributes:
        ours: the method; None for Muon's step alone.
        reference: who made the other and how it is built; None where there is none.
    """

    ours: m.Method | None
    reference: tuple[str, Callable[[Path, Any], Side]] | None = None


CASES = {
    "sparseloco": Comparison(
        m.get("sparseloco", every=1, decay=DECAY), ("CCLoco", references.ccloco)
    ),
    "diloco float32": Comparison(
        m.get("diloco", every=1, values="parameter", outer=_NESTEROV),
        ("torchft", references.torchft),
    ),
    "diloco bf16": Comparison(m.get("diloco", every=1, outer=_NESTEROV)),
    "diloco 8bit": Comparison(
        m.get("muloco", every=1, decay=DECAY, values="8bit", outer=_NESTEROV, inner=m.AdamW()),
        ("MuLoCo", references.muloco(8)),
    ),
    "muloco 4bit": Comparison(
        m.get("muloco", every=1, decay=DECAY, outer=_NESTEROV, inner=m.AdamW()),
        ("MuLoCo", references.muloco(4)),
    ),
    "muloco 2bit": Comparison(
        m.get("muloco", every=1, decay=DECAY, values="2bit", outer=_NESTEROV, inner=m.AdamW()),
        ("MuLoCo", references.muloco(2)),
    ),
    "muon": Comparison(None, ("torch.optim.Muon", references.torch_muon)),
    "distro": Comparison(m.get("distro", k=2)),
    "demo": Comparison(m.get("demo"), ("DeMo", references.demo)),
    "demo-v2": Comparison(m.get("demo-v2"), ("DeMo", references.demo)),
    "random-k": Comparison(
        m.get("random-k", values="parameter", outer=m.Sign()), ("DeToNATION", references.random_k)
    ),
    "dense": Comparison(m.get("dense")),
}


def ours(method: m.Method | None) -> Side:
    """Our side: one replica that receives its own message."""
    model = Model(SHAPES)
    named = dict(model.named_parameters())
    if method is None:
        return Side(model, False, MuonAdamW(named.items(), lr=RATE).step)
    replica = m.Replica(method, named, replica=0, replicas=1)

    def step() -> None:
        replica.before_forward(replica.step)
        if method.is_local:
            replica.stepped()
        else:
            replica.local(RATE, 1.0)
        sent = replica.send()
        assert sent is not None
        if replica.due():
            refused = replica.receive(replica.in_flight()[0].unsqueeze(0))
            assert not refused, refused

    return Side(model, method.is_local, step)


def timed(side: Side, rounds: int) -> list[float]:
    """Milliseconds of each step; the first two warm up."""
    times = []
    for _ in range(rounds + 2):
        side.prepare()
        start = time.perf_counter()
        side.step()
        times.append(1e3 * (time.perf_counter() - start))
    return times[2:]


def compare(case: Comparison, folder: Path | None, rounds: int, turns: int = 2) -> dict[str, Any]:
    """Percentiles of both sides' milliseconds, and of how many times faster ours is.

    Raises:
        FileNotFoundError: the reference is not there.
        ModuleNotFoundError: it wants a package that is not there.
    """
    sides = {"ours": ours(case.ours)}
    if case.reference is not None:
        name, build = case.reference
        if folder is None and not name.startswith("torch."):
            raise FileNotFoundError(f"{name} is wanted: see --references")
        sides[name] = build(folder or Path(), SHAPES)
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(turns):
        for name, side in sides.items():
            times[name] += timed(side, rounds)
    found: dict[str, Any] = {name: percentiles(t) for name, t in times.items()}
    if case.reference is not None:
        found["ratio"] = found[case.reference[0]]["p50"] / found["ours"]["p50"]
    return found


@contextmanager
def group() -> Iterator[None]:
    """A process group of one, which references want."""
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case.reference is not None])
def test_step_is_as_many_times_faster_as_asked(name):
    where = os.environ.get(ENVIRONMENT)
    with group():
        try:
            found = compare(CASES[name], Path(where) if where else None, 10)
        except (FileNotFoundError, ModuleNotFoundError) as missing:
            pytest.skip(str(missing))
    print(found)
    assert found["ratio"] >= ASKED


def main() -> None:
    if stay_awake(os.environ):  # as in a rank: references gather over gloo; torch is there already
        os.execv(sys.executable, sys.orig_argv)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--references", type=Path, default=os.environ.get(ENVIRONMENT))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--case", action="append", choices=CASES, help="default: all")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    report: dict[str, Any] = {"benchmark": "methods", "cases": {}}
    with group():
        report |= {
            "parameters": elements(SHAPES),
            "copy_gb_per_s": copy_bandwidth(torch.device("cpu")),
            "environment": environment(),
        }
        print(", ".join(f"{k} {v}" for k, v in report["environment"].items()))
        print(f"{'method':>15} {'who':>16} {'p20 ms':>8} {'p50 ms':>8} {'p80 ms':>8}")
        for name in arguments.case or CASES:
            case = CASES[name]
            try:
                found = compare(case, arguments.references, arguments.rounds)
            except (FileNotFoundError, ModuleNotFoundError) as missing:
                print(f"{name:>15} without its reference: {missing}")
                found = compare(Comparison(case.ours), None, arguments.rounds)
            for who, figures in found.items():
                if who == "ratio":
                    print(f"{name:>15} {'times as fast':>16} {figures:17.2f}")
                else:
                    shown = " ".join(f"{figures[p]:8.1f}" for p in ("p20", "p50", "p80"))
                    print(f"{name:>15} {who:>16} {shown}", flush=True)
            report["cases"][name] = found
    if arguments.out:
        write_json(arguments.out, report)


if __name__ == "__main__":
    main()
