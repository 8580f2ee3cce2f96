"""Sections of the GPU suite, each in a process of its own, case by case.

What has been found is written down before and after every case, so that a kill loses nothing. A
case that raises is recorded and the next one runs. A case that leaves the GPU unusable (an illegal
address), ends the process or hangs costs this process only: the section is entered again in a new
one, with what it has found until then, and goes on at the next case.
"""

from __future__ import annotations

import faulthandler
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

from benchmarks import suite_report

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "benchmarks/gpu_suite.py"
MARGIN_S = 6.0
"""What a section leaves of its time for ending in order."""
CASE_S = 40.0
"""After so long a case counts as hanging, unless told otherwise."""
UNUSABLE = 75
"""Exit status of a process that cannot use the GPU any more."""


@dataclass
class Run:
    """One section at work, in a process of its own.

    Attributes:
        tiny: dry run.
        path: where `found` is written.
        deadline: of `time.monotonic`.
        found: the section's part of the report. While it runs "done" has the names of the cases
            that are over, and "at" the name of the one at work.
    """

    tiny: bool
    path: Path
    deadline: float
    found: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        import torch

        from benchmarks.common import device_here

        cuda = torch.cuda.is_available()
        if not cuda and not self.tiny:
            raise RuntimeError("no CUDA device; --tiny is the dry run on a CPU")
        self.device = device_here()
        self.backend = "triton" if cuda else "interpret"
        self.layers = "tiny" if self.tiny else "1.2B"
        self.checked_on = "tiny" if self.tiny else "small"
        self.budget_ms = 0.0 if self.tiny else 150.0
        self.found = {"status": "incomplete", "done": [], **self.found}

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

    def case(
        self,
        name: str,
        call: Callable[[], dict[str, Any] | None],
        *,
        line: Callable[[dict[str, Any]], str] = str,
        seconds: float = CASE_S,
    ) -> None:
        """Do a case, unless an earlier process has, or note that there is no time left for it.

        Args:
            name: no other case of the section has it.
            call: does it; returns what is to be recorded, if anything.
            line: what is printed of the record.
            seconds: after so long it hangs, and the process ends.
        """
        from benchmarks.common import as_fault, attempt

        if name in self.found["done"]:
            return
        if self.left() <= 0:
            self.found.setdefault("left_out", []).append(name)
            return
        self.found["at"] = name
        self.save()
        usable = True
        with stacks(self.path).open("w") as file:
            faulthandler.dump_traceback_later(seconds, exit=True, file=file)
            try:
                record = attempt(call, self.device)
            except Exception as error:
                usable, record = False, as_fault(error)
            finally:
                faulthandler.cancel_dump_traceback_later()
        del self.found["at"]
        self.found["done"].append(name)
        if record is None:
            self.save()
            return
        record = {"name": name, **record}
        print(line(record), flush=True)
        self.add(record)
        if not usable:
            sys.exit(UNUSABLE)


def stacks(path: Path) -> Path:
    """Where the stack of a case that hangs is written."""
    return path.with_suffix(".stacks")


def run_section(section: Callable[[Run], None], path: Path, seconds: float, tiny: bool) -> None:
    """In a process of its own: do a section and leave its part of the report at `path`."""
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    try:
        run = Run(tiny, path, time.monotonic() + seconds, found)
        found = run.found
        section(run)
        found["status"] = "ok"
        run.save()
    except Exception:
        # Whatever it was belongs in the report: the machine may be gone when it is read.
        suite_report.write(path, {**found, "status": "failed", "error": traceback.format_exc()})
        raise


def in_own_process(
    name: str, folder: Path, seconds: float, tiny: bool, env: dict[str, str]
) -> dict[str, Any]:
    """Run a section and return its part of the report; kill it when it overruns.

    Args:
        name: the section's.
        folder: for files in between.
        seconds: for all processes together.
        tiny: dry run.
        env: environment variables.

    Returns:
        What was found, with "status": "ok", "incomplete" where time was short, "faults" where a
        case has failed, "wrong" where results were, "failed" where the section itself has.
    """
    deadline = time.monotonic() + seconds
    path = folder / f"{name}.part.json"
    path.unlink(missing_ok=True)
    while True:
        left = deadline - time.monotonic()
        command = [sys.executable, str(SCRIPT), "--run", name, "--result", str(path)]
        command += ["--seconds", str(left - MARGIN_S)] + ["--tiny"] * tiny
        process = subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True)
        killed = wait_or_kill(process, left)
        found = {"status": "failed"}
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
        at = found.pop("at", None)
        if killed:
            found["error"] = f"killed after {seconds:.0f} s" + (f", at {at}" if at else "")
            break
        if at is not None:
            record = {"name": at, "fault": _how(process.returncode, stacks(path))}
            print(f"{at}: {record['fault']}", flush=True)
            found.setdefault("records", []).append(record)
            found["done"].append(at)
        elif process.returncode != UNUSABLE:
            if process.returncode and "error" not in found:
                found |= {"status": "failed", "error": _ended(process.returncode)}
            break
        if deadline - time.monotonic() < 2 * MARGIN_S:
            found.setdefault("left_out", []).append("what comes after the last fault")
            break
        suite_report.write(path, found)
    path.unlink(missing_ok=True)
    stacks(path).unlink(missing_ok=True)
    found.pop("done", None)
    return {**found, "status": _status(found)}


def wait_or_kill(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Whether a process had to be killed, its children with it."""
    try:
        process.wait(max(0.0, seconds))
    except subprocess.TimeoutExpired:
        return True
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return False


def _how(returncode: int, stack: Path) -> str:
    """Why a process has ended within a case."""
    text = stack.read_text(encoding="utf-8", errors="replace") if stack.exists() else ""
    return f"hung: {text.strip()}" if text.strip() else f"its process {_ended(returncode)}"


def _ended(returncode: int) -> str:
    if returncode < 0:
        return f"ended with signal {signal.Signals(-returncode).name}"
    return f"ended with status {returncode}"


def _status(found: dict[str, Any]) -> str:
    records = [*found.get("records", []), found]
    if any(not r["check"]["ok"] for r in records if "check" in r):
        return "wrong"
    if found["status"] == "failed":
        return "failed"
    if any("fault" in r for r in records) or found.get("faults"):
        return "faults"
    complete = found["status"] == "ok" and "left_out" not in found
    return "ok" if complete else "incomplete"
