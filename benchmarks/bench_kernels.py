"""Every kernel against its PyTorch twin and the plain formulation, and whole optimiser steps.

    python benchmarks/bench_kernels.py --out results.json     # --set 1.2B, --case encode, ...
    python -m pytest benchmarks/bench_kernels.py              # the same under pytest-benchmark
    python benchmarks/plot.py results.json --out folder       # draws it

On a CPU the twins run ("small", 5.5 M elements), on CUDA all, by default on the layers of a 1.2B
model. Implementations: `triton` (`interpret` with --interpret: the same kernels in Triton's
interpreter, whose times mean nothing), `torch`, the twin, and `plain`, what the reference DeMo does
parameter by parameter (einsum, topk, scatter-mean), or a loop over parameters where DeMo has
nothing. Nothing is timed that has not just been found right.

GB/s counts the bytes that the operation has to move at least, whatever an implementation moves, in
the time that its kernels take on the GPU by the profiler; `ms` has what the host takes to launch
them besides. `floor_ms` is how long a large copy takes to move as many.
"""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

if __name__ == "__main__":  # run as a script from a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    if "--interpret" in sys.argv:  # has to be set before triton is imported
        os.environ["TRITON_INTERPRET"] = "1"

import torch

from benchmarks.common import (
    attempt,
    copy_bandwidth,
    device_here,
    environment,
    write_json,
)
from psyche_fast.bench import step_cases
from psyche_fast.bench.kernel_data import Data
from psyche_fast.bench.kernels import BF16, CASES, FP32, kernel_backend, measure, one
from psyche_fast.bench.shapes import SETS


def line(record: dict[str, Any]) -> str:
    """One line of the table."""
    if "fault" in record:
        return f"{record['name']:<57} FAULT {record['fault']}"
    start = f"{record['kernel']:>11} {record['variant']:<44} {record['implementation']:>10}"
    if "ms" not in record:
        return f"{start}  WRONG {record['check']}"
    target = record["target_us_per_million"]
    return (
        f"{start} {record['ms']['p50']:10.3f} {record['us_per_million']:9.3f} "
        f"{f'{target:.1f}' if target else '':>6} {record['bytes_per_element']:6.2f} "
        f"{record['gb_per_s']:8.1f} {100 * record['copy_fraction']:5.1f} "
        f"{record['launches'] if record['launches'] is not None else '':>5}"
    )


HEADER = (
    f"{'kernel':>11} {'variant':<44} {'':>10} {'p50 ms':>10} {'us/M':>9} {'target':>6} "
    f"{'B/elem':>6} {'GB/s':>8} {'%copy':>5} {'launches':>5}"
)


def _here() -> tuple[torch.device, str, torch.dtype]:
    """The device, and what layers and parameters are measured on it unless told otherwise."""
    device = device_here()
    return (device, "1.2B", BF16) if device.type == "cuda" else (device, "small", FP32)


@pytest.fixture(scope="module")
def data() -> Data:
    device, layers, dtype = _here()
    return Data(SETS[layers], device, dtype)


@pytest.fixture(scope="module")
def bandwidth(data: Data) -> float:
    return copy_bandwidth(data.device)


@pytest.mark.parametrize("implementation", ["triton", "torch", "plain"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernel(benchmark, data, bandwidth, case, implementation):
    if implementation == "triton" and data.device.type != "cuda":
        pytest.skip("the kernels are timed on a GPU")
    backend = "triton" if data.device.type == "cuda" else "torch"
    work = case.build(data, backend)
    if implementation not in work.calls:
        pytest.skip("the plain formulation has nothing like it")
    record = measure(case, data, work, implementation, copy_gb_per_s=bandwidth, budget_ms=0.0)
    assert record["check"]["ok"], record["check"]
    benchmark.group = case.name
    benchmark.extra_info.update(environment() | record)

    def finished() -> None:
        work.calls[implementation]()
        if data.device.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(finished, rounds=5)


@pytest.mark.parametrize("case", step_cases.CASES, ids=lambda case: case.name)
def test_step(benchmark, data, case):
    backend = "triton" if data.device.type == "cuda" else "torch"
    assert step_cases.check(case, SETS["small"], data.device, backend)["ok"]
    optimizer = step_cases.Stepper(
        case, data.shapes, data.device, backend, case.dtype or data.dtype
    )
    benchmark.group = "optimiser step"
    benchmark.extra_info.update(environment() | {"elements": data.elements})

    def finished() -> None:
        optimizer.step()
        if data.device.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(finished, rounds=5, warmup_rounds=1)


def main() -> None:
    device, layers, dtype = _here()
    if kernel_backend(device) == "interpret":
        dtype = BF16
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--set", default=layers, choices=SETS, help=f"layers, default {layers}")
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument("--only", action="append", default=[], help="only this implementation")
    parser.add_argument("--no-steps", action="store_true", help="leave out optimiser steps")
    parser.add_argument("--interpret", action="store_true", help="run the kernels on a CPU too")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    bandwidth = copy_bandwidth(device)
    report: dict[str, Any] = {
        "benchmark": "kernels",
        "environment": environment(),
        "copy_gb_per_s": bandwidth,
        "records": [],
        "steps": [],
    }
    print(", ".join(f"{k} {v}" for k, v in report["environment"].items()))
    print(f"{arguments.set}; a large copy moves {bandwidth:.0f} GB/s\n{HEADER}")
    data, backend = Data(SETS[arguments.set], device, dtype), kernel_backend(device) or "torch"
    for case in CASES:
        for name in dict.fromkeys((backend, "torch", "plain")):
            if arguments.case not in case.name or name not in (arguments.only or [name]):
                continue
            measured = partial(one, case, data, name, copy_gb_per_s=bandwidth)
            record = attempt(measured, device)
            if record is not None:
                record = {"set": arguments.set, "name": f"{case.name}, {name}", **record}
                print(line(record), flush=True)
                report["records"].append(record)
    if not arguments.no_steps:
        print(step_cases.HEADER)
        for case in step_cases.CASES:
            if arguments.case in case.name:
                measured = partial(
                    step_cases.measure,
                    case,
                    arguments.set,
                    device,
                    backend,
                    dtype=dtype,
                    copy_gb_per_s=bandwidth,
                )
                record = {"name": case.name, **attempt(measured, device)}
                print(step_cases.line(record), flush=True)
                report["steps"].append(record)
    if arguments.out:
        write_json(arguments.out, report)
    records = report["records"] + report["steps"]
    wrong = [r for r in records if "fault" in r or not r["check"]["ok"]]
    if wrong:
        sys.exit(f"{len(wrong)} of the cases are wrong or have failed")


if __name__ == "__main__":
    main()
