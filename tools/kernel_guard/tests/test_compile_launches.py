"""The plug-in that compiles what tests launch, on tests whose outcome is known."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tools.kernel_guard import compile_launches

pytest.importorskip("triton")
CASES = Path(__file__).with_name("launching_cases.py")


def run(cache, *which):
    """Status and output of a pytest with the plug-in."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["-p", "tools.kernel_guard.compile_launches", *which]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache)}
    environment.pop("PYTEST_ADDOPTS", None)
    root = Path(__file__).parents[3]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout


@pytest.mark.timeout(400)
def test_launches_are_told_apart_and_compiled_once(tmp_path):
    """By dtype, address and whether n is 1, divisible by 16 or neither: 2 x 2 x 3 of 24."""
    status, output = run(tmp_path, "-n", "2", str(CASES))
    assert status == 1, output
    assert "3 passed" in output
    assert "14 specialisations of kernels were launched; 12 compile for sm_90" in output
    assert "halves(x: *bf16/16, out: *bf16/16, WHOLE=True) with no options" in output
    assert "Cannot bitcast data-type of size 16 to data-type of size 32" in output
    assert (
        "launched by tools/kernel_guard/tests/launching_cases.py::test_a_kernel_that_no" in output
    )
    assert "bytes of shared memory, there are 232448" in output

    status, output = run(tmp_path, f"{CASES}::test_one_kernel_many_ways")
    assert status == 0, output
    assert (
        "12 specialisations of kernels were launched; 12 compile for sm_90 up to llir "
        "(12 were known), 0 do not"
    ) in output


def test_a_run_without_launches_proves_nothing(monkeypatch):
    monkeypatch.setattr(compile_launches, "_launched", {})
    option = SimpleNamespace(collectonly=False, compile_until="llir")
    session = SimpleNamespace(config=SimpleNamespace(option=option), exitstatus=pytest.ExitCode.OK)
    compile_launches.pytest_sessionfinish(session)
    assert session.exitstatus == pytest.ExitCode.TESTS_FAILED
    shown = []
    reporter = SimpleNamespace(section=shown.append, line=lambda text, **_: shown.append(text))
    compile_launches.pytest_terminal_summary(reporter, session.config)
    assert "no kernel was launched, so nothing is proved" in shown
