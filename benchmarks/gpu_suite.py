"""All that wants a GPU, in one command and under nine minutes.

    PYTHONPATH=. python benchmarks/gpu_suite.py --out results

Correctness of the kernels, benchmarks of kernels and optimiser steps, CUDA graphs, a train step of
a 1B Llama, sweeps over what could not be settled without a GPU, autotuning. Needs torch, triton,
transformers, numpy, matplotlib, pytest and hypothesis, nothing else of the project's dependencies.

Every section runs in a process of its own: a kernel that crashes or hangs takes only its section
with it. Each may use its share of the time and what earlier ones have left; what it has found is
written down as it goes, so that a kill loses nothing. Results: suite.json, correctness.log,
tuning.toml and pictures. The exit status is not 0 if a kernel is wrong or a section has failed.

`--tiny` is a dry run of the same code on a CPU, through Triton's interpreter, in under a minute;
its times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":  # run as a script from a checkout that is not installed
    sys.path.insert(0, str(ROOT))

from benchmarks import suite_report  # noqa: E402
from benchmarks.suite_tests import run_tests  # noqa: E402

MARGIN_S = 6.0
"""What a section leaves of its time for ending in order."""


@dataclass
class Run:
    """One section at work, in a process of its own.

    Attributes:
        tiny: dry run.
        path: where `found` is written.
        deadline: of `time.monotonic`.
        found: the section's part of the report.
    """

    tiny: bool
    path: Path
    deadline: float
    found: dict[str, Any] = field(default_factory=lambda: {"status": "incomplete"})

    def __post_init__(self) -> None:
        import torch

        self.cuda = torch.cuda.is_available()
        if not self.cuda and not self.tiny:
            raise RuntimeError("no CUDA device; --tiny is the dry run on a CPU")
        self.device = torch.device("cuda" if self.cuda else "cpu")
        self.backend = "triton" if self.cuda else "interpret"
        self.layers = "tiny" if self.tiny else "1.2B"
        self.checked_on = "tiny" if self.tiny else "small"
        self.budget_ms = 0.0 if self.tiny else 150.0

    def save(self) -> None:
        """Write down what has been found so far."""
        suite_report.write(self.path, self.found)

    def add(self, record: dict[str, Any]) -> None:
        """Add a record, and write everything down."""
        self.found.setdefault("records", []).append(record)
        self.save()

    def left(self) -> float:
        """Seconds left."""
        return self.deadline - time.monotonic()

    def out_of_time(self, name: str) -> bool:
        """Whether the deadline has passed; then `name` is noted as left out."""
        if self.left() > 0:
            return False
        self.found.setdefault("left_out", []).append(name)
        return True

    def finish(self) -> None:
        """Tell by the records how it went."""
        records = [*self.found.get("records", []), self.found]
        if any(not r["check"]["ok"] for r in records if "check" in r):
            self.found["status"] = "wrong"
        elif "left_out" not in self.found:
            self.found["status"] = "ok"
        self.save()


def environment(run: Run) -> None:
    """Hardware, versions, and the bandwidth of a large copy."""
    from benchmarks import common

    run.found["environment"] = common.environment()
    run.found["copy_gb_per_s"] = common.copy_bandwidth(run.device)


def kernels(run: Run) -> None:
    """Every kernel, its twin, and the plain formulation."""
    from benchmarks import bench_kernels
    from benchmarks.common import copy_bandwidth

    run.found["copy_gb_per_s"] = copy_bandwidth(run.device)
    cases = [c for c in bench_kernels.CASES if c.quick or not run.tiny]
    # First the kernels alone: those are the figures that matter most.
    passes: list[tuple[str, ...]] = [(run.backend,), ("torch", "plain")]
    for only in [("interpret", "torch", "plain")] if run.tiny else passes:
        for case in cases:
            if run.out_of_time(f"{case.name}: {', '.join(only)}"):
                continue
            for record in bench_kernels.run(
                [case],
                run.layers,
                run.device,
                dtype=bench_kernels.BF16,
                copy_gb_per_s=run.found["copy_gb_per_s"],
                budget_ms=run.budget_ms,
                only=only,
            ):
                print(bench_kernels.line(record), flush=True)
                run.add(record)


def steps(run: Run) -> None:
    """Whole optimiser steps."""
    from benchmarks import step_cases
    from benchmarks.common import copy_bandwidth

    run.found["copy_gb_per_s"] = copy_bandwidth(run.device)
    for case in step_cases.CASES:
        if run.tiny and not case.quick:
            continue
        if run.out_of_time(case.name):
            continue
        record = step_cases.measure(
            case,
            run.layers,
            run.device,
            run.backend,
            dtype=step_cases.BF16,
            copy_gb_per_s=run.found["copy_gb_per_s"],
            budget_ms=run.budget_ms,
            checked_on=run.checked_on,
        )
        print(step_cases.line(record), flush=True)
        run.add(record)


def graph(run: Run) -> None:
    """Optimiser steps as CUDA graphs."""
    from benchmarks import step_cases

    for case in step_cases.GRAPHS:
        if run.out_of_time(case.name):
            continue
        try:
            record = step_cases.measure_graph(
                case,
                run.layers,
                run.device,
                run.backend,
                checked_on=run.checked_on,
                budget_ms=run.budget_ms,
            )
        except RuntimeError as error:  # of a capture that is refused nothing else suffers
            record = {"name": case.name, "fault": str(error).splitlines()[0]}
            record["check"] = {"ok": False, "against": "could not be captured"}
        print(record, flush=True)
        run.add(record)


def train(run: Run) -> None:
    """A train step of a Llama with 1.2 billion parameters, with AdamW and with DisTrO."""
    import torch

    from benchmarks import llama_step

    settings = llama_step.TINY if run.tiny else llama_step.LLAMA_1B
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


def sweeps(run: Run) -> None:
    """Launch options one after the other."""
    import torch

    from benchmarks import sweeps as questions
    from benchmarks.kernel_data import Data
    from benchmarks.shapes import SETS

    data = Data(SETS[run.layers], run.device, torch.bfloat16)
    for record in questions.run(data, run.backend, budget_ms=run.budget_ms, quick=run.tiny):
        print(questions.line(record), flush=True)
        run.add(record)
        if run.left() < 0:
            last = questions.SWEEPS[-1]
            if record["sweep"] != last.name or record["kernel"] != last.kernel:
                run.found["left_out"] = [f"what comes after {record['case']} {record['options']}"]
            return


def autotune(run: Run) -> None:
    """Tune every kernel; the table is to be kept."""
    from dataclasses import asdict

    from benchmarks.common import milliseconds, percentiles
    from psyche_fast.kernels import autotune as tuner

    def keep(trial: tuner.Trial) -> None:
        run.found.setdefault("trials", []).append(asdict(trial))
        run.save()

    if run.cuda:
        table = tuner.autotune(run.device, budget_s=run.left(), record=keep)
    else:

        def timer(call: Callable[[], object], device: Any) -> float:
            return percentiles(milliseconds(call, device, budget_ms=0.0))["p50"]

        table = tuner.tune(
            run.device, None, 0.0, backend=run.backend, chunks=1, timer=timer, record=keep
        )
    run.found["table"] = table
    path = run.path.parent / "tuning.toml"
    path.unlink(missing_ok=True)
    tuner.write(path, tuner.gpu_name(run.device) or "cpu", table)


def compile_all(run: Run) -> None:
    """Compile on all cores what the following sections need: one of them at a time takes longer."""
    from benchmarks import precompile

    faults = precompile.run(run.tiny, run.left)
    run.found |= {"compiled": precompile.count(run.tiny), "faults": faults}


SECTIONS: dict[str, tuple[float, Callable[[Run], None] | None]] = {
    # By importance, with the seconds that each may take; tests are run by the suite itself.
    "environment": (15.0, environment),
    "correctness": (120.0, None),
    "compile": (55.0, compile_all),
    "kernels": (75.0, kernels),
    "steps": (55.0, steps),
    "graph": (25.0, graph),
    "train": (55.0, train),
    "sweeps": (65.0, sweeps),
    "autotune": (45.0, autotune),
}
PLOTS_S = 15.0


def run_section(name: str, path: Path, seconds: float, tiny: bool) -> None:
    """In a process of its own: do a section and leave its part of the report at `path`."""
    call = SECTIONS[name][1]
    assert call is not None
    run = None
    try:
        run = Run(tiny, path, time.monotonic() + seconds)
        call(run)
        run.finish()
    except Exception:
        # Whatever it was belongs in the report: the machine may be gone when it is read.
        found = run.found if run else {}
        suite_report.write(path, {**found, "status": "failed", "error": traceback.format_exc()})
        raise


def in_own_process(
    name: str, folder: Path, seconds: float, tiny: bool, env: dict[str, str]
) -> dict[str, Any]:
    """Run a section and return its part of the report; kill it when it overruns."""
    path = folder / f"{name}.part.json"
    path.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--run", name, "--result", str(path)]
    command += ["--seconds", str(seconds - MARGIN_S)] + ["--tiny"] * tiny
    process = subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True)
    killed = False
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        killed = True
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    found: dict[str, Any] = {"status": "failed"}
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        path.unlink()
    if killed:
        found["error"] = f"killed after {seconds:.0f} s"
    elif process.returncode and "error" not in found:
        found |= {"status": "failed", "error": f"ended with status {process.returncode}"}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for the results")
    parser.add_argument("--seconds", type=float, default=525.0, help="for everything")
    parser.add_argument("--sections", default=",".join(SECTIONS), help="default: %(default)s")
    parser.add_argument("--tiny", action="store_true", help="dry run on a CPU")
    parser.add_argument("--run", choices=SECTIONS, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        run_section(arguments.run, arguments.result, arguments.seconds, arguments.tiny)
        return
    if arguments.out is None:
        parser.error("--out is missing: a folder for the results")
    wanted = arguments.sections.split(",")
    for name in wanted:
        if name not in SECTIONS:
            parser.error(f"--sections: no section {name!r}; known are {', '.join(SECTIONS)}")
    sys.exit(suite(arguments.out.resolve(), wanted, arguments.seconds, arguments.tiny))


def suite(folder: Path, wanted: list[str], seconds: float, tiny: bool) -> int:
    """Run sections one after the other; the exit status."""
    begun = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    paths = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    if tiny:
        env |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    report: dict[str, Any] = {
        "benchmark": "gpu_suite",
        "tiny": tiny,
        "sections": {
            name: {"status": "skipped", "reason": "not reached" if name in wanted else "not asked"}
            for name in SECTIONS
        },
    }
    end = begun + seconds - PLOTS_S
    planned = begun
    for name, (budget, call) in SECTIONS.items():
        planned += budget if name in wanted else 0.0
        if name not in wanted:
            continue
        start = time.monotonic()
        allowed = min(planned, end) - start
        if allowed < 2 * MARGIN_S:
            found = {"status": "skipped", "reason": f"{max(0.0, end - start):.0f} s were left"}
        else:
            print(f"\n== {name}, up to {allowed:.0f} s", flush=True)
            if call is None:
                found = run_tests(ROOT, folder / "correctness.log", allowed, env, quick=tiny)
            else:
                found = in_own_process(name, folder, allowed, tiny, env)
        report["sections"][name] = {**found, "seconds": time.monotonic() - start}
        report["seconds"] = time.monotonic() - begun
        suite_report.write(folder / "suite.json", report)
    command = [sys.executable, ROOT / "benchmarks/plot.py", folder / "suite.json", "--out", folder]
    drawn = subprocess.run(command, env=env, cwd=ROOT, timeout=60, check=False)
    report["plots"] = "ok" if drawn.returncode == 0 else f"status {drawn.returncode}"
    report["seconds"] = time.monotonic() - begun
    suite_report.write(folder / "suite.json", report)
    print("\n" + suite_report.table(report), flush=True)
    # Tests that were not all run prove nothing; other sections may well be short of time.
    right = "correctness" not in wanted or report["sections"]["correctness"]["status"] == "ok"
    bad = any(s["status"] in ("wrong", "failed") for s in report["sections"].values())
    return 0 if right and not bad else 1


if __name__ == "__main__":
    main()
