"""How the GPU suite runs the kernels' tests, and which of them it can run on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import suite_tests

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.timeout(300)  # processes that import torch, on a machine with other work


PASSING = """
import pytest
@pytest.mark.parametrize("what", ["a b", "c"])
def test_passes(what): pass
@pytest.mark.gpu
def test_skips(): pytest.skip("no")
"""


# As if an illegal address had been read: what the plugin asks is answered so.
BREAKS = """
def test_breaks():
    from benchmarks import suite_plugin
    suite_plugin.unusable = lambda: True
    assert 0
"""


@pytest.mark.parametrize(
    ("extra", "status", "failed"),
    [
        ("", "ok", []),
        (
            "def test_fails(): assert 0\n"
            "def test_dies():\n  import os; os.abort()\n"
            "def test_hangs():\n  import time; time.sleep(60)\n" + BREAKS + "def test_last(): pass",
            "wrong",
            [
                f"tests/kernels/test_x.py::test_{name}"
                for name in ("fails", "breaks", "dies", "hangs")
            ],
        ),
    ],
    ids=["all pass", "three end their process"],
)
def test_outcomes_of_tests(tmp_path, extra, status, failed):
    """Those after one that hangs, ends its process or breaks the GPU run in a new process."""
    (tmp_path / "tests/kernels").mkdir(parents=True)
    (tmp_path / "tests/kernels/test_x.py").write_text(PASSING + extra)
    (tmp_path / "tests/kernels/test_aot.py").write_text("def test_compiles(): assert 0")
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}
    options = {"quick": False, "test_seconds": 3.0}
    found = suite_tests.run_tests(tmp_path, tmp_path / "log", 120.0, env, **options)
    assert (found["status"], found["failed"]) == (status, failed)
    assert found["outcomes"]["passed"] == 2 + ("test_last" in extra)
    assert found["outcomes"]["skipped"] == 1
    assert found["tests"] == 3 + extra.count("def ")
    log = (tmp_path / "log").read_text()
    assert "test_passes[a b] PASSED" in log
    assert ("Timeout (0:00:03)!" in log) == ("test_hangs" in extra)


def test_tests_that_are_killed_at_the_deadline_are_incomplete(tmp_path, monkeypatch):
    (tmp_path / "tests/kernels").mkdir(parents=True)
    at_work = tmp_path / "at work"
    slow = f"def test_slow():\n  import time; open({str(at_work)!r}, 'w'); time.sleep(60)"
    (tmp_path / "tests/kernels/test_x.py").write_text(PASSING + slow)
    clock = SimpleNamespace(sleep=time.sleep, monotonic=lambda: 1e9 * at_work.exists())
    monkeypatch.setattr(suite_tests, "time", clock)
    monkeypatch.setattr(suite_tests, "MOST_PROCESSES", 1)
    found = suite_tests.run_tests(tmp_path, tmp_path / "log", 90.0, dict(os.environ), quick=False)
    assert (found["status"], found["failed"]) == ("incomplete", [])
    assert found["outcomes"] == {"passed": 2, "skipped": 1}


AS_ON_A_GPU = """
import os, torch
os.environ["TRITON_INTERPRET"] = "0"
torch.cuda.is_available = lambda: True
"""


def test_tests_that_cannot_hold_on_a_gpu_are_skipped_there(tmp_path):
    (tmp_path / "as_on_a_gpu.py").write_text(AS_ON_A_GPU)
    both = "tests/distro/test_message.py::test_kernels_and_reference_understand_each_other"
    files = ["tests/kernels/test_backends.py", both]
    options = ["-p", "as_on_a_gpu", "-p", "no:cacheprovider", "-q", "-k", "not is_started"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert "4 skipped" in done.stdout.splitlines()[-1]


def test_tests_that_cannot_be_collected_are_a_failure(tmp_path):
    (tmp_path / "tests/kernels").mkdir(parents=True)
    (tmp_path / "tests/kernels/test_x.py").write_text("import nothing_of_this_name")
    found = suite_tests.run_tests(tmp_path, tmp_path / "log", 60.0, dict(os.environ), quick=False)
    assert found["status"] == "failed"
    assert "nothing_of_this_name" in (tmp_path / "log").read_text()
