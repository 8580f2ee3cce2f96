"""Runs the kernels' tests for `gpu_suite.py`, spread over processes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.suite_process import ROOT, UNUSABLE

# These test the compiler's output or the interpreter, and need no GPU.
WITHOUT_GPU = ("test_aot.py", "test_compile_guard.py", "test_interpreter.py", "test_sass.py")
QUICK = ("test_versions.py",)
OUTCOME = re.compile(r"^(tests/\S.*?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b", re.MULTILINE)
MOST_PROCESSES = 14
TEST_S = 90.0
"""After so long a test counts as hanging; some compile 34 kernels."""
LIMIT = "PSYCHE_FAST_TEST_SECONDS"
"""The environment variable that tells it to the processes."""
NOT_RUN = (2, 4, 5)
"""Exit statuses of pytest where it is no test that has ended it."""


@dataclass
class Share:
    """Some tests and the processes that run them, one after the other.

    Attributes:
        base: the command without the tests.
        tests: all of them, in order.
        log: where the output goes.
        root: the checkout.
        env: environment variables.
        died: tests that have ended their process.
    """

    base: list[str]
    tests: list[str]
    log: Path
    root: Path
    env: dict[str, str]
    died: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._start(self.tests)

    def _start(self, tests: list[str]) -> None:
        chosen = self.log.with_suffix(".txt")
        chosen.write_text("\n".join(tests), encoding="utf-8")
        with self.log.open("a") as output:
            self.process = subprocess.Popen(
                [*self.base, "-v", f"@{chosen}"],
                cwd=self.root, env=self.env, stdout=output, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip

    def outcomes(self) -> dict[str, str]:
        """Of the tests that have come to an end."""
        text = self.log.read_text(errors="replace")
        told = {test: outcome.lower() for test, outcome in OUTCOME.findall(text)}
        return told | dict.fromkeys(self.died, "died")

    def over(self) -> bool:
        """Whether all is done. Where a test has ended the process, a new one goes on after it."""
        status = self.process.poll()
        if status is None:
            return False
        outcomes = self.outcomes()
        left = [test for test in self.tests if test not in outcomes]
        if not left or status in NOT_RUN:
            return True
        if status != UNUSABLE:  # that has been told as a failure
            self.died.append(left.pop(0))
        if left:
            self._start(left)
        return not left

    def kill(self) -> None:
        """End what still runs."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def pytest_command(root: Path) -> list[str]:
    """Pytest with none of the project's settings, to be followed by tests; `LIMIT` has to be set.

    Args:
        root: the checkout.
    """
    return [
        *(sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", str(root)),
        *("-p", "no:cacheprovider", "--import-mode=importlib", "-o", "pythonpath=."),
        *("-W", "ignore::pytest.PytestUnknownMarkWarning", "--tb=short"),
        *("-p", "benchmarks.suite_plugin"),
    ]


def run_tests(
    root: Path,
    log: Path,
    seconds: float,
    env: dict[str, str],
    *,
    quick: bool,
    test_seconds: float = TEST_S,
) -> dict[str, Any]:
    """Run `tests/kernels` with nothing but pytest: no plugins, none of the project's settings.

    A test that hangs, ends its process or breaks the GPU has failed; those after it still run.

    Args:
        root: the checkout.
        log: where the output goes.
        seconds: what is left after which everything still running is killed.
        env: environment variables.
        quick: only a few tests.
        test_seconds: after so long a test hangs.

    Returns:
        "status" ("ok", "wrong", "incomplete" or "failed"), how many tests had which outcome, and
        which failed.
    """
    deadline = time.monotonic() + seconds
    base = pytest_command(root)
    # Plugins that happen to be installed would make a run differ from one without them.
    env = {**env, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", LIMIT: str(test_seconds)}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
    files = [
        str(path.relative_to(root))
        for path in sorted((root / "tests/kernels").glob("test_*.py"))
        if (path.name in QUICK if quick else path.name not in WITHOUT_GPU)
    ]
    try:
        collected = subprocess.run(
            [*base, "--collect-only", "-q", *files],
            cwd=root, env=env, capture_output=True, text=True, timeout=seconds, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"status": "failed", "error": f"tests were not collected in {seconds:.0f} s"}
    tests = [line for line in collected.stdout.splitlines() if "::" in line and line[:5] == "tests"]
    if collected.returncode != 0 or not tests:
        log.write_text(collected.stdout + collected.stderr, encoding="utf-8")
        return {"status": "failed", "error": "tests could not be collected, see correctness.log"}
    processes = max(1, min(MOST_PROCESSES, (os.cpu_count() or 1) - 2, len(tests)))
    with tempfile.TemporaryDirectory() as folder:
        shares = [
            Share(base, tests[number::processes], Path(folder) / f"{number}.log", root, env)
            for number in range(processes)
        ]
        running = list(shares)
        while running and time.monotonic() < deadline:
            time.sleep(0.1)
            running = [share for share in running if not share.over()]
        for share in running:
            share.kill()
        outcomes: dict[str, list[str]] = {}
        for share in shares:
            for test, outcome in share.outcomes().items():
                outcomes.setdefault(outcome, []).append(test)
        log.write_text(
            "\n".join(share.log.read_text(errors="replace") for share in shares), encoding="utf-8"
        )
        crashed = any(share.process.returncode for share in shares)
    failed = [test for what in ("failed", "error", "died") for test in outcomes.get(what, [])]
    if failed:
        status = "wrong"
    elif sum(map(len, outcomes.values())) < len(tests):
        status = "incomplete"
    else:
        # A crash after the last test, say.
        status = "failed" if crashed else "ok"
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
