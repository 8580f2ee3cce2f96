"""Everything that has to be known of a GPU, in one run of less than nine minutes.

    PYTHONPATH=. python benchmarks/gpu_suite.py --out results

From a bare checkout: needs torch, triton, transformers, numpy, matplotlib, pytest and hypothesis,
but not this project's other dependencies, and no network. Sections come in the order of their
value, each in a process of its own that is killed when its time is over. What has been found is
written down as it goes, so that a kill loses nothing. A case that fails is recorded, and the next
one runs, in a new process where the GPU or the process did not survive it. Results: suite.json,
correctness.log, tuning.toml and pictures. The exit status is not 0 if a kernel is wrong or a
section or a case has failed.

`--tiny` is a dry run of the same code on a CPU, through Triton's interpreter, in about a minute;
its times mean nothing. `gpu_counters.py` has what needs a profiler or a sanitizer.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":  # run as a script from a checkout that is not installed
    sys.path.insert(0, str(ROOT))

from benchmarks import suite_report  # noqa: E402
from benchmarks.suite_process import MARGIN_S, in_own_process, run_section  # noqa: E402
from benchmarks.suite_sections import SECTIONS  # noqa: E402
from benchmarks.suite_tests import run_tests  # noqa: E402

PLOTS_S = 15.0
WARM_UP_S = 45.0
WARM_UP = (
    "import torch, triton; torch.zeros(1, device='cuda' if torch.cuda.is_available() else None)"
)


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
        section = SECTIONS[arguments.run][1]
        assert section is not None
        run_section(section, arguments.result, arguments.seconds, arguments.tiny)
        return
    if arguments.out is None:
        parser.error("--out is missing: a folder for the results")
    wanted = arguments.sections.split(",")
    for name in wanted:
        if name not in SECTIONS:
            parser.error(f"--sections: no section {name!r}; known are {', '.join(SECTIONS)}")
    sys.exit(suite(arguments.out.resolve(), wanted, arguments.seconds, arguments.tiny))


def environment(tiny: bool) -> dict[str, str]:
    """Environment variables of everything that is started."""
    paths = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    if tiny:
        env |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return env


def warm_up(env: dict[str, str]) -> float:
    """Import what everything imports and wake the GPU, before the clock starts; seconds taken.

    On a machine that has just started the first import reads gigabytes from its disk. An error is
    left to the sections, which report it.
    """
    begun = time.monotonic()
    try:
        subprocess.run([sys.executable, "-c", WARM_UP], env=env, timeout=WARM_UP_S, check=False)
    except subprocess.TimeoutExpired:
        print(f"the first import took more than {WARM_UP_S:.0f} s", flush=True)
    return time.monotonic() - begun


def suite(folder: Path, wanted: list[str], seconds: float, tiny: bool) -> int:
    """Run sections one after the other; the exit status."""
    folder.mkdir(parents=True, exist_ok=True)
    env = environment(tiny)
    warm = warm_up(env)
    begun = time.monotonic()
    report: dict[str, Any] = {
        "benchmark": "gpu_suite",
        "tiny": tiny,
        "warm_up_seconds": warm,
        "sections": {
            name: {"status": "skipped", "reason": "not reached" if name in wanted else "not asked"}
            for name in SECTIONS
        },
    }
    end = begun + seconds - PLOTS_S
    # Where only some sections are wanted, these have all the time.
    budgets = {name: SECTIONS[name][0] for name in SECTIONS if name in wanted}
    scale = max(1.0, (end - begun) / sum(budgets.values()))
    planned = begun
    for name, budget in budgets.items():
        planned += scale * budget
        start = time.monotonic()
        # A dry run shows that everything works, however busy the machine is.
        allowed = (end if tiny else min(planned, end)) - start
        if allowed < 2 * MARGIN_S:
            found = {"status": "skipped", "reason": f"{max(0.0, end - start):.0f} s were left"}
        else:
            print(f"\n== {name}, up to {allowed:.0f} s", flush=True)
            if SECTIONS[name][1] is None:
                found = run_tests(ROOT, folder / f"{name}.log", allowed, env, quick=tiny)
            else:
                found = in_own_process(name, folder, allowed, tiny, env)
        report["sections"][name] = {**found, "seconds": time.monotonic() - start}
        report["seconds"] = time.monotonic() - begun
        suite_report.write(folder / "suite.json", report)
    command = [sys.executable, ROOT / "benchmarks/plot.py", folder / "suite.json", "--out", folder]
    report["plots"] = _plots(command, env)
    report["seconds"] = time.monotonic() - begun
    suite_report.write(folder / "suite.json", report)
    print("\n" + suite_report.table(report), flush=True)
    # Tests that were not all run prove nothing; other sections may well be short of time.
    complete = all(
        report["sections"][name]["status"] == "ok"
        for name in ("smoke", "correctness")
        if name in wanted
    )
    bad = {"wrong", "faults", "failed"}
    return 0 if complete and not any(s["status"] in bad for s in report["sections"].values()) else 1


def _plots(command: list[Any], env: dict[str, str]) -> str:
    try:
        drawn = subprocess.run(command, env=env, cwd=ROOT, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        return "not drawn in 60 s"
    return "ok" if drawn.returncode == 0 else f"status {drawn.returncode}"


if __name__ == "__main__":
    main()
