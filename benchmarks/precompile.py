"""Compiles what a suite is going to measure, on all cores, into Triton's cache."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from itertools import chain
from pathlib import Path

import torch
from triton.errors import TritonError

from benchmarks import bench_kernels, step_cases, sweeps
from benchmarks.kernel_data import Data
from benchmarks.shapes import SETS
from psyche_fast.kernels import autotune, tuning
from psyche_fast.kernels.workloads import workload

Job = tuple[str, int, int, int]
MOST_PROCESSES = 12


def jobs(tiny: bool) -> list[Job]:
    """Kind and numbers of everything to be compiled; one of each kind where `tiny`."""
    found: list[Job] = [("kernel", i, 0, 0) for i in range(len(bench_kernels.CASES))]
    found += [("step", i, 0, 0) for i, case in enumerate(step_cases.CASES) if case.ours]
    for i, sweep in enumerate(sweeps.SWEEPS):
        for j in range(len(sweep.builds)):
            found += [("sweep", i, j, k) for k in range(len(sweep.settings))]
    for i, groups in enumerate(autotune.SEARCH.values()):
        found += [("tune", i, j, 0) for j in range(len(list(chain(*groups))))]
    return list({job[0]: job for job in reversed(found)}.values()) if tiny else found


def run(tiny: bool, left: Callable[[], float]) -> list[str]:
    """Run every job once on a few chunks; what cannot run is returned, not raised.

    Args:
        tiny: dry run.
        left: seconds left; what has not begun when they are over is dropped.
    """
    processes = 1 if tiny else max(1, min(MOST_PROCESSES, (os.cpu_count() or 1) - 2))
    faults = []
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        waiting = [pool.submit(compile_one, job) for job in jobs(tiny)]
        try:
            for done in as_completed(waiting, timeout=left()):
                faults += done.result()
        except TimeoutError:
            faults.append(f"{sum(not f.done() for f in waiting)} were left out for time")
            pool.shutdown(wait=False, cancel_futures=True)
    return faults


def count(tiny: bool) -> int:
    """Number of jobs."""
    return len(jobs(tiny))


@cache
def _data() -> Data:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Data(SETS["tiny"], device, torch.bfloat16)


def compile_one(job: Job) -> list[str]:
    """Run one job; the fault, if it cannot run with its options."""
    kind, i, j, k = job
    data = _data()
    backend = "triton" if data.device.type == "cuda" else "interpret"
    try:
        if kind == "kernel":
            bench_kernels.CASES[i].build(data, backend).calls[backend]()
        elif kind == "step":
            stepper = step_cases.Stepper(
                step_cases.CASES[i], data.shapes, data.device, backend, data.dtype
            )
            for _ in range(2):
                stepper.step()
        elif kind == "sweep":
            sweep = sweeps.SWEEPS[i]
            work = sweep.builds[j][1](data, backend)
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "table.toml"
                with sweeps.applied(sweep, sweep.settings[k], path, data.device):
                    work.calls[backend]()
        else:
            kernel = list(autotune.SEARCH)[i]
            changes = list(chain(*autotune.SEARCH[kernel]))[j]
            options = {**tuning.options(kernel, data.device), **changes}
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "table.toml"
                gpu = autotune.gpu_name(data.device)
                with autotune.using(path, gpu, {kernel: options}):
                    workload(kernel, data.device, backend, 1).run()
        if data.device.type == "cuda":
            torch.cuda.synchronize()
    except TritonError as error:  # registers or shared memory do not suffice
        return [f"{job}: {str(error).splitlines()[0]}"]
    return []
