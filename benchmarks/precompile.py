"""Compiles what a suite is going to measure, on all cores, into Triton's cache."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import chain
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from benchmarks import sweeps
from benchmarks.common import as_fault, device_here, unusable
from psyche_fast.bench import kernels, step_cases
from psyche_fast.bench.kernel_data import Data
from psyche_fast.bench.shapes import SETS
from psyche_fast.kernels import autotune, tuning
from psyche_fast.kernels.workloads import workload

Job = tuple[str, int, int, int]
MOST_PROCESSES = 14


def jobs(tiny: bool) -> list[Job]:
    """Kind and numbers of everything to be compiled; one of each kind where `tiny`."""
    found: list[Job] = [("kernel", i, 0, 0) for i in range(len(kernels.CASES))]
    found += [("step", i, 0, 0) for i, case in enumerate(step_cases.CASES) if case.ours]
    for i, sweep in enumerate(sweeps.SWEEPS):
        for j in range(len(sweep.builds)):
            found += [("sweep", i, j, k) for k in range(len(sweep.settings))]
    for i, groups in enumerate(autotune.SEARCH.values()):
        found += [("tune", i, j, 0) for j in range(len(list(chain(*groups))))]
    return list({job[0]: job for job in reversed(found)}.values()) if tiny else found


def run(
    todo: list[Job], left: Callable[[], float], compile_job: Callable[[Job], str | None]
) -> list[str]:
    """Do every job once; what cannot be done is returned, not raised.

    A job whose process dies, or becomes unusable, is a fault like another; what comes after it
    runs in a new process.

    Args:
        todo: the jobs.
        left: seconds left; what has not ended when they are over is dropped.
        compile_job: does a job, and returns what went wrong; a module's function.
    """
    cores = max(1, min(MOST_PROCESSES, (os.cpu_count() or 1) - 2, len(todo)))
    waiting = iter(todo)
    with ThreadPoolExecutor(cores) as threads:
        parts = [threads.submit(_several, waiting, left, compile_job) for _ in range(cores)]
    return list(chain(*(part.result() for part in parts)))


def _several(
    waiting: Iterator[Job], left: Callable[[], float], compile_job: Callable[[Job], str | None]
) -> list[str]:
    """Take jobs one after the other, and have a process do them."""
    faults = []
    worker: tuple[BaseProcess, Connection] | None = None
    for job in waiting:
        if left() <= 0:
            faults.append(f"{job}: left out for time")
            continue
        worker = worker or _start(compile_job)
        process, pipe = worker
        try:
            pipe.send(job)
            if pipe.poll(max(0.0, left())):
                fault, usable = pipe.recv()
            else:
                fault, usable = "not done in time", False
        except (EOFError, OSError):
            process.join(5)
            fault, usable = f"its process ended with status {process.exitcode}", False
        if fault is not None:
            faults.append(f"{job}: {fault}")
        if not usable:
            process.kill()
            worker = None
    if worker is not None:
        worker[1].close()
        worker[0].join()
    return faults


def _start(compile_job: Callable[[Job], str | None]) -> tuple[BaseProcess, Connection]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, compile_job), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def _serve(pipe: Connection, compile_job: Callable[[Job], str | None]) -> None:
    """In a process of its own: do jobs until the other end is closed."""
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        fault = compile_job(job)
        pipe.send((fault, not (fault and unusable(device_here()))))


def compile_one(job: Job) -> str | None:
    """Run one job on a few chunks; the fault, if it cannot run."""
    try:
        _run(job, _data())
    except Exception as error:  # that registers or shared memory do not suffice, say
        return str(as_fault(error)["fault"])
    return None


@cache
def _data() -> Data:
    return Data(SETS["tiny"], device_here(), torch.bfloat16)


def _run(job: Job, data: Data) -> None:
    kind, i, j, k = job
    backend = "triton" if data.device.type == "cuda" else "interpret"
    if kind == "kernel":
        kernels.CASES[i].build(data, backend).calls[backend]()
    elif kind == "step":
        stepper = step_cases.Stepper(
            step_cases.CASES[i], data.shapes, data.device, backend, data.dtype
        )
        for _ in range(2):
            stepper.step()
    else:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "table.toml"
            if kind == "sweep":
                sweep = sweeps.SWEEPS[i]
                work = sweep.builds[j][1](data, backend)
                with sweeps.applied(sweep, sweep.settings[k], path, data.device):
                    work.calls[backend]()
            else:
                kernel = list(autotune.SEARCH)[i]
                changes = list(chain(*autotune.SEARCH[kernel]))[j]
                options = {**tuning.options(kernel, data.device), **changes}
                with autotune.using(path, autotune.gpu_name(data.device), {kernel: options}):
                    workload(kernel, data.device, backend, 1).run()
    if data.device.type == "cuda":
        torch.cuda.synchronize()
