"""Runs the kernels' tests for `gpu_suite.py`, spread over processes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# These test the compiler's output or the interpreter, and need no GPU.
WITHOUT_GPU = ("test_aot.py", "test_compile_guard.py", "test_interpreter.py", "test_sass.py")
QUICK = ("test_backends.py",)
OUTCOME = re.compile(r"^(tests/\S.*?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b", re.MULTILINE)
MOST_PROCESSES = 10


def run_tests(
    root: Path, log: Path, seconds: float, env: dict[str, str], *, quick: bool
) -> dict[str, Any]:
    """Run `tests/kernels` with nothing but pytest: no plugins, none of the project's settings.

    Args:
        root: the checkout.
        log: where the output goes.
        seconds: what is left after which everything still running is killed.
        env: environment variables.
        quick: only a few tests.

    Returns:
        "status" ("ok", "wrong", "incomplete" or "failed"), how many tests had which outcome, and
        which failed.
    """
    deadline = time.monotonic() + seconds
    base = [
        *(sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", str(root)),
        *("-p", "no:cacheprovider", "--import-mode=importlib", "-o", "pythonpath=."),
        *("-W", "ignore::pytest.PytestUnknownMarkWarning", "--tb=short"),
    ]
    # Plugins that happen to be installed would make a run differ from one without them.
    env = {**env, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    files = [
        str(path.relative_to(root))
        for path in sorted((root / "tests/kernels").glob("test_*.py"))
        if (path.name in QUICK if quick else path.name not in WITHOUT_GPU)
    ]
    collected = subprocess.run(
        [*base, "--collect-only", "-q", *files],
        cwd=root, env=env, capture_output=True, text=True, timeout=seconds, check=False,
    )  # fmt: skip
    tests = [line for line in collected.stdout.splitlines() if "::" in line and line[:5] == "tests"]
    if collected.returncode != 0 or not tests:
        log.write_text(collected.stdout + collected.stderr, encoding="utf-8")
        return {"status": "failed", "error": "tests could not be collected, see correctness.log"}
    processes = max(1, min(MOST_PROCESSES, (os.cpu_count() or 1) - 2, len(tests)))
    with tempfile.TemporaryDirectory() as folder:
        running, outputs = [], []
        for number in range(processes):
            chosen = Path(folder) / f"{number}.txt"
            chosen.write_text("\n".join(tests[number::processes]), encoding="utf-8")
            outputs.append(Path(folder) / f"{number}.log")
            with outputs[-1].open("w") as output:
                running.append(
                    subprocess.Popen(
                        [*base, "-v", f"@{chosen}"],
                        cwd=root, env=env, stdout=output, stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )  # fmt: skip
        killed = 0
        for process in running:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                killed += 1
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        text = "\n".join(path.read_text(errors="replace") for path in outputs)
    log.write_text(text, encoding="utf-8")
    outcomes: dict[str, list[str]] = {}
    for test, outcome in OUTCOME.findall(text):
        outcomes.setdefault(outcome.lower(), []).append(test)
    failed = outcomes.get("failed", []) + outcomes.get("error", [])
    done = sum(map(len, outcomes.values()))
    if failed:
        status = "wrong"
    elif killed or done < len(tests):
        status = "incomplete"
    else:
        # A crash after the last test, say.
        status = "failed" if any(process.returncode for process in running) else "ok"
    found: dict[str, Any] = {
        "status": status,
        "tests": len(tests),
        "processes": processes,
        "outcomes": {outcome: len(names) for outcome, names in outcomes.items()},
        "failed": failed,
    }
    if status != "ok":
        print("\n".join(f"FAILED {name}" for name in failed[:20]), flush=True)
    return found
