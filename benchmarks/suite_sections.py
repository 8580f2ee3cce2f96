"""What the sections of the GPU suite do."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.suite_process import Run


def environment(run: Run) -> None:
    """Hardware, versions, and the bandwidth of a large copy."""
    from benchmarks import common

    run.found["environment"] = common.environment()
    _bandwidth(run)


def smoke(run: Run) -> None:
    """Every kernel once, against its twin on the CPU."""
    from benchmarks import smoke as kernel

    for name, kind, operation in kernel.CASES:
        call = partial(
            kernel.measure, kind, operation, run.device, run.backend, tiny=run.tiny
        )  # fmt: skip
        run.case(f"{name}, {kind}", call, line=kernel.line)


def compile_all(run: Run) -> None:
    """Compile on all cores what the following sections need: one of them at a time takes longer."""
    from benchmarks import precompile

    jobs = precompile.jobs(run.tiny)
    faults = precompile.run(jobs, run.left, precompile.compile_one)
    run.found |= {"compiled": len(jobs), "faults": faults}


def kernels(run: Run) -> None:
    """Every kernel, its twin, and the plain formulation."""
    import torch

    from benchmarks import bench_kernels
    from psyche_fast.bench import kernels as measured
    from psyche_fast.bench.kernel_data import Data
    from psyche_fast.bench.shapes import SETS

    speed = _bandwidth(run)
    data = Data(SETS[run.layers], run.device, torch.bfloat16)
    # First the kernels alone: those are the figures that matter most.
    for names in ((run.backend,), ("torch", "plain")):
        for case in measured.CASES:
            for name in names:
                if case.quick or not run.tiny:
                    call = partial(
                        measured.one,
                        case,
                        data,
                        name,
                        copy_gb_per_s=speed,
                        budget_ms=run.budget_ms,
                    )
                    run.case(f"{case.name}, {name}", call, line=bench_kernels.line)


def steps(run: Run) -> None:
    """Whole optimiser steps."""
    from psyche_fast.bench import step_cases

    speed = _bandwidth(run)
    for case in step_cases.CASES:
        if case.quick or not run.tiny:
            call = partial(
                step_cases.measure,
                case,
                run.layers,
                run.device,
                run.backend,
                dtype=step_cases.BF16,
                copy_gb_per_s=speed,
                budget_ms=run.budget_ms,
                checked_on=run.checked_on,
            )
            run.case(case.name, call, line=step_cases.line)


def train(run: Run) -> None:
    """A train step of a Llama with 1.2 billion parameters, with AdamW and with DisTrO."""
    import torch

    from benchmarks import llama_step

    settings = llama_step.TINY if run.tiny else llama_step.LLAMA_1B

    def compare() -> None:
        rows, length, rounds = (1, 64, (2, 2)) if run.tiny else (4, 2048, (5, 30))
        while True:
            try:
                for report in llama_step.compare(
                    settings,
                    run.device,
                    run.backend,
                    rows=rows,
                    length=length,
                    rounds=rounds,
                    out_of_time=lambda: run.left() < 0,
                ):
                    run.found |= report
                    run.save()
                return
            except torch.OutOfMemoryError:
                if rows == 1:
                    raise
                rows //= 2
                print(f"out of memory, {rows} sequences instead", flush=True)

    run.case("AdamW and DisTrO in turns", compare, seconds=run.left() + 60.0)


def sweeps(run: Run) -> None:
    """Launch options one after the other."""
    import torch

    from benchmarks import sweeps as questions
    from psyche_fast.bench.kernel_data import Data
    from psyche_fast.bench.shapes import SETS

    data = Data(SETS[run.layers], run.device, torch.bfloat16)
    for name, call in questions.cases(
        data, run.backend, budget_ms=run.budget_ms / 2, quick=run.tiny
    ):
        run.case(name, call, line=questions.line)


def autotune(run: Run) -> None:
    """Tune every kernel; the table is to be kept."""
    from dataclasses import asdict

    from benchmarks.common import milliseconds, percentiles
    from psyche_fast.kernels import autotune as tuner

    def keep(trial: tuner.Trial) -> None:
        run.found.setdefault("trials", []).append(asdict(trial))
        run.save()

    def timer(call: Callable[[], object], device: Any) -> float:
        return percentiles(milliseconds(call, device, budget_ms=0.0))["p50"]

    def tune(kernel: str, budget_s: float) -> None:
        if run.tiny:
            table = tuner.tune(
                run.device, [kernel], 0.0,
                backend=run.backend, chunks=1, timer=timer, record=keep,
            )  # fmt: skip
        else:
            table = tuner.autotune(run.device, [kernel], budget_s, record=keep)
        run.found["table"] = {**run.found.get("table", {}), **table}
        path = run.path.parent / "tuning.toml"
        path.unlink(missing_ok=True)
        tuner.write(path, tuner.gpu_name(run.device) or "cpu", run.found["table"])

    for number, kernel in enumerate(tuner.SEARCH):
        share = max(0.0, run.left()) / (len(tuner.SEARCH) - number)
        run.case(kernel, partial(tune, kernel, share), seconds=share + 30.0)


def _bandwidth(run: Run) -> float:
    """Of a large copy, in GB/s, once in a section."""
    from benchmarks.common import copy_bandwidth

    if "copy_gb_per_s" not in run.found:
        run.found["copy_gb_per_s"] = copy_bandwidth(run.device)
    return float(run.found["copy_gb_per_s"])


SECTIONS: dict[str, tuple[float, Callable[[Run], None] | None]] = {
    # By importance, with the seconds that each may take; tests are run by the suite itself.
    "environment": (15.0, environment),
    "smoke": (35.0, smoke),
    "correctness": (180.0, None),
    "compile": (50.0, compile_all),
    "kernels": (70.0, kernels),
    "steps": (45.0, steps),
    "train": (45.0, train),
    "sweeps": (30.0, sweeps),
    "autotune": (25.0, autotune),
}
