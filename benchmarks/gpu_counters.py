"""What wants a run of its own on a GPU: counters, sanitizers, bits, and a kernel's aftermath.

    PYTHONPATH=. python benchmarks/gpu_counters.py --out results/counters

By value: bits of repeated runs and of the GPU against Triton's interpreter; bytes of DRAM and L2,
stalls and occupancy of encode, apply and accumulate, by ncu; a matrix product right after encode;
compute-sanitizer over some tests. Each piece is a process of its own with a limit in time; what it
said is in NAME.log, figures are in counters.json. A tool that the machine lacks is recorded as
missing. The exit status is not 0 if a piece has failed or has found something wrong.

`--tiny` is a dry run on a CPU: commands that need a tool are printed.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":  # run as a script from a checkout that is not installed
    sys.path.insert(0, str(ROOT))

from benchmarks import suite_report  # noqa: E402
from benchmarks.gpu_suite import environment, warm_up  # noqa: E402
from benchmarks.suite_process import wait_or_kill  # noqa: E402
from benchmarks.suite_tests import LIMIT, OUTCOME, pytest_command  # noqa: E402

WORK = ROOT / "benchmarks/counter_work.py"
STALLS = ("membar", "barrier", "long_scoreboard", "short_scoreboard", "wait")
METRICS: dict[str, tuple[str, ...]] = {
    "memory": ("gpu__time_duration.sum", "dram__bytes_read.sum", "dram__bytes_write.sum"),
    "L2": (
        "lts__t_sectors_op_read.sum",
        "lts__t_sectors_op_write.sum",
        "lts__t_sectors_op_red.sum",
    ),
    # Warps that wait for it, on average, per instruction that is issued.
    "stalls": tuple(
        f"smsp__average_warps_issue_stalled_{what}_per_issue_active.ratio" for what in STALLS
    ),
    "occupancy": ("sm__warps_active.avg.pct_of_peak_sustained_active",),
}
"""What is counted, in groups that are asked for one by one where not all are known together."""
PROFILED = {"encode": "encode_tiles", "apply": "apply_tiles", "accumulate": "accumulate_blocks"}
SANITIZED = (
    ("memcheck", "tests/kernels/test_launch.py", ""),
    ("synccheck", "tests/kernels/test_launch.py", ""),
    ("initcheck", "tests/kernels/test_rows.py", "64"),
    ("memcheck", "tests/kernels/test_rows.py", "64"),
    ("racecheck", "tests/kernels/test_rows.py", "64"),
)
UNITS = {"Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9, "usecond": 1e3, "us": 1e3, "msecond": 1e6,
         "ms": 1e6, "second": 1e9, "s": 1e9}  # fmt: skip
"""To bytes and nanoseconds."""

Found = dict[str, Any]


@dataclass(frozen=True)
class Piece:
    """One process.

    Attributes:
        name: as it is shown, and of its log.
        command: what is run.
        read: figures of what it has printed, with "status".
        seconds: after so long it is killed.
        tool: the program that it needs besides Python, None where it runs on a CPU too.
        env: environment variables besides the usual.
        otherwise: what is run in its place where not all metrics are known.
    """

    name: str
    command: list[str]
    read: Callable[[str], Found]
    seconds: float
    tool: str | None = None
    env: dict[str, str] = field(default_factory=dict)
    otherwise: tuple[Piece, ...] = ()


def pieces(folder: Path, tiny: bool) -> Iterator[Piece]:
    """Everything, by its value."""
    work = [sys.executable, str(WORK)]
    small = ["--tiny"] * tiny
    ours, theirs = folder / "gpu.pt", folder / "interpreter.pt"
    repeated = [*work, "bits", "--out", str(ours), *small]
    yield Piece("bits of repeated runs", repeated, partial(read_json, exact=True), 60.0)
    against = [*work, "bits", "--out", str(theirs), "--against", str(ours), *small]
    interpreter = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    yield Piece("bits against the interpreter", against, read_json, 120.0, env=interpreter)
    for kernel in PROFILED:
        alone = tuple(
            _profile(folder, kernel, [*work, kernel], group, names, 40.0)
            for group, names in METRICS.items()
        )
        names = tuple(name for group in METRICS.values() for name in group)
        yield _profile(folder, kernel, [*work, kernel], "all", names, 60.0, otherwise=alone)
    yield Piece("matrix product after encode", [*work, "product", *small], read_json, 60.0)
    for tool, file, chosen in SANITIZED:
        yield _sanitize(folder, tool, file, chosen)


def _profile(
    folder: Path, kernel: str, work: list[str], group: str, names: tuple[str, ...], seconds: float,
    otherwise: tuple[Piece, ...] = (),
) -> Piece:  # fmt: skip
    """The second launch of a kernel under ncu."""
    name = f"ncu {kernel} {group}"
    log = folder / f"{slug(name)}.csv"
    command = [
        *("ncu", "--clock-control", "none", "--csv", "--log-file", str(log)),
        *("--kernel-name", f"regex:^{PROFILED[kernel]}", "--launch-skip", "1"),
        *("--launch-count", "1", "--metrics", ",".join(names), *work),
    ]
    read = partial(read_profile, log=log, names=names)
    return Piece(name, command, read, seconds, "ncu", otherwise=otherwise)


def _sanitize(folder: Path, tool: str, file: str, chosen: str) -> Piece:
    """Tests under compute-sanitizer; memory of torch's own that it can tell apart."""
    name = f"{tool} {Path(file).stem}"
    log = folder / f"{slug(name)}.report"
    command = [
        *("compute-sanitizer", "--tool", tool, "--error-exitcode", "77", "--print-limit", "20"),
        *("--target-processes", "all", "--log-file", str(log)),
        *pytest_command(ROOT),
        *("-v", file, *(["-k", chosen] if chosen else [])),
    ]
    env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", LIMIT: "120"}
    env["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    read = partial(read_sanitizer, log=log)
    return Piece(name, command, read, 100.0, "compute-sanitizer", env)


def slug(name: str) -> str:
    """A name as a file's."""
    return name.replace(" ", "-")


def read_json(output: str, *, exact: bool = False) -> Found:
    """The last line that a work of ours has printed; with `exact` no bits may differ."""
    lines = [line for line in output.splitlines() if line.startswith("{")]
    if not lines:
        return {"status": "failed", "fault": last_line(output)}
    found: Found = json.loads(lines[-1])
    wrong = exact and any(found["differ"].values())
    return {"status": "wrong" if wrong else "ok", **found}


def read_profile(output: str, *, log: Path, names: tuple[str, ...]) -> Found:
    """Ncu's metrics, in bytes and nanoseconds, beside the bytes that have to be moved."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    metrics = metrics_of(text)
    missing = [name for name in names if name not in metrics]
    found: Found = {"metrics": metrics}
    least = read_json(output)
    if least["status"] == "ok":
        found["least_bytes"] = least["bytes"]
    if not missing:
        return {"status": "ok", **found}
    said = [line for line in text.splitlines() if line.startswith("==ERROR==")]
    fault = said[0] if said else last_line(text) or last_line(output)
    return {"status": "faults", "fault": fault, "missing": missing, **found}


def metrics_of(text: str) -> dict[str, float]:
    """Metrics of the first kernel in ncu's CSV, which has a line for each."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    metrics: dict[str, float] = {}
    for row in csv.DictReader(lines):
        name, value = row.get("Metric Name"), row.get("Metric Value")
        if name and value and name not in metrics:
            try:
                number = float(value.replace(",", ""))
            except ValueError:  # "n/a": this GPU does not count it
                continue
            metrics[name] = number * UNITS.get(row.get("Metric Unit") or "", 1.0)
    return metrics


def read_sanitizer(output: str, *, log: Path) -> Found:
    """How many errors, the first of them, and how many tests have come to which outcome."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    outcomes: dict[str, int] = {}
    for _, outcome in OUTCOME.findall(output):
        outcomes[outcome.lower()] = outcomes.get(outcome.lower(), 0) + 1
    summaries = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", text)
    found: Found = {"outcomes": outcomes}
    if not summaries:
        return {"status": "failed", "fault": last_line(text) or last_line(output), **found}
    found["errors"] = sum(map(int, summaries))
    if found["errors"]:
        found["first"] = [line for line in text.splitlines() if line.strip("= ")][1:12]
    tests = not outcomes.keys() & {"failed", "error"} and "passed" in outcomes
    return {"status": "ok" if tests and not found["errors"] else "wrong", **found}


def last_line(text: str) -> str:
    """What something said last."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def locate(tool: str) -> str | None:
    """Path of one of CUDA's tools, on the search path or where it is usually installed."""
    places = [Path(found) for found in [shutil.which(tool)] if found]
    for pattern in ("usr/local/cuda*/bin", "opt/nvidia/nsight-compute/*"):
        places += sorted(Path("/").glob(f"{pattern}/{tool}"), reverse=True)
    return str(places[0]) if places else None


def do(piece: Piece, folder: Path, seconds: float, env: dict[str, str], tiny: bool) -> Found:
    """Run a piece; its figures."""
    tool = locate(piece.tool) if piece.tool else None
    command = [tool if part == piece.tool and tool else part for part in piece.command]
    print(f"\n== {piece.name}\n{shlex.join(command)}", flush=True)
    if piece.tool and tiny:
        return {"status": "skipped", "reason": "a dry run"}
    if piece.tool and tool is None:
        return {"status": "missing", "reason": f"no {piece.tool} on this machine"}
    path = folder / f"{slug(piece.name)}.log"
    with path.open("w") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env={**env, **piece.env}, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        killed = wait_or_kill(process, min(piece.seconds, seconds))
    found = piece.read(path.read_text(encoding="utf-8", errors="replace"))
    if killed:
        return {**found, "status": "failed", "fault": f"killed after {piece.seconds:.0f} s"}
    if process.returncode and found["status"] == "ok":
        return {**found, "status": "failed", "fault": f"status {process.returncode}"}
    return found


def run(folder: Path, seconds: float, tiny: bool) -> int:
    """Run all pieces; the exit status."""
    folder.mkdir(parents=True, exist_ok=True)
    env = environment(tiny)
    warm_up(env)
    deadline = time.monotonic() + seconds
    report: dict[str, Any] = {"benchmark": "gpu_counters", "tiny": tiny, "pieces": {}}
    todo = list(pieces(folder, tiny))
    while todo:
        piece = todo.pop(0)
        left = deadline - time.monotonic()
        found: Found = {"status": "skipped", "reason": "no time was left"}
        if left > 1:
            try:
                found = do(piece, folder, left, env, tiny)
            except (OSError, ValueError, KeyError) as error:
                found = {"status": "failed", "fault": f"{type(error).__name__}: {error}"}
        if "find metric" in found.get("fault", ""):
            todo[:0] = piece.otherwise
        report["pieces"][piece.name] = found
        suite_report.write(folder / "counters.json", report)
        print(json.dumps(found), flush=True)
    print()
    for name, found in report["pieces"].items():
        print(f"{name:>32}  {found['status']}", found.get("reason") or found.get("fault") or "")
    bad = {"wrong", "faults", "failed"}
    return int(any(found["status"] in bad for found in report["pieces"].values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--seconds", type=float, default=525.0, help="for everything")
    parser.add_argument("--tiny", action="store_true", help="dry run on a CPU")
    arguments = parser.parse_args()
    sys.exit(run(arguments.out.resolve(), arguments.seconds, arguments.tiny))


if __name__ == "__main__":
    main()
