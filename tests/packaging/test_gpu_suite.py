"""The GPU suite: a dry run without a GPU, its deadlines, and what it measures on."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks import (
    gpu_suite,
    smoke,
    suite_process,
)
from tests import groups

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.timeout(300)  # processes that import torch, on a machine with other work
# Dependencies of the project that the suite has to do without.
ABSENT = ("click", "msgspec", "psutil", "pyarrow", "pytest_benchmark", "pytest_timeout", "tomli_w")
SITE = f"""
from importlib.machinery import PathFinder
found = PathFinder.find_spec
def find_spec(cls, name, path=None, target=None):
    return None if name.split(".")[0] in {ABSENT!r} else found(name, path, target)
PathFinder.find_spec = classmethod(find_spec)
"""


def numbers(value):
    """All numbers within a report."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            yield from numbers(one)
    elif isinstance(value, (int, float)):
        yield value


def bare(arguments):
    """The suite, in a process where the packages are absent, with sections that are forked."""
    ours = ("psyche_fast", "benchmarks", "tests")
    for name in [name for name in sys.modules if name.split(".")[0] in (*ABSENT, *ours)]:
        del sys.modules[name]
    exec(SITE, {})
    groups.fork_ranks({str(suite_process.SCRIPT): f"{__name__}:section"})
    section(arguments)


def section(arguments):
    sys.argv = ["gpu_suite.py", *arguments]
    importlib.import_module("benchmarks.gpu_suite").main()


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.timeout(1200)  # half a minute on a quiet machine
def test_dry_run_from_a_bare_checkout(tmp_path):
    """Every section, through the interpreter, with none of the packages that may be missing."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(SITE)
    out = tmp_path / "out"
    suite = groups.Command(
        "--tiny", "--seconds", "1100", "--out", str(out), program=f"{__name__}:bare", folder=ROOT,
        environment={"PYTHONPATH": f"{tmp_path / 'site'}{os.pathsep}."},
    )  # fmt: skip
    stdout, stderr = suite.communicate(1150)
    assert suite.returncode == 0, stdout[-3000:] + stderr[-3000:]
    files = sorted(path.name for path in out.iterdir())
    pictures = ["kernels.png", "steps.png", "sweeps.png", "train.png"]
    assert files == sorted(["correctness.log", "suite.json", "tuning.toml", *pictures])
    assert all(1000 < (out / name).stat().st_size < 16 << 20 for name in pictures)
    report = json.loads((out / "suite.json").read_text())
    sections = report["sections"]
    assert {name: s["status"] for name, s in sections.items()} == dict.fromkeys(sections, "ok")
    assert list(sections) == list(gpu_suite.SECTIONS)
    assert all(math.isfinite(number) for number in numbers(report))
    assert report["tiny"]
    assert report["plots"] == "ok"
    assert sections["correctness"]["outcomes"] == {"passed": sections["correctness"]["tests"]}
    kernels = sections["kernels"]["records"]
    assert len(sections["smoke"]["records"]) == len(smoke.CASES)
    kinds = {
        "encode",
        "apply",
        "subtract",
        "lookahead",
        "accumulate",
        "codec",
        "outer",
        "cross entropy",
        "take up",
    }
    assert {r["kernel"] for r in kernels if r["implementation"] == "interpret"} == kinds
    assert {r["implementation"] for r in kernels} == {"interpret", "torch", "plain"}
    for section in ("kernels", "steps", "sweeps"):
        for record in sections[section]["records"]:
            assert record["check"]["ok"]
            assert 0 < record["ms"]["p20"] <= record["ms"]["p50"] <= record["ms"]["p80"]
    assert {r["kernel"] for r in sections["sweeps"]["records"]} == {"encode", "apply", "lookahead"}
    assert sections["train"]["losses"].keys() == {"AdamW", "DisTrO"}
    assert {t["kernel"] for t in sections["autotune"]["trials"]} == set(
        sections["autotune"]["table"]
    )
    assert sections["compile"] | {"seconds": 0} == {
        "status": "ok", "compiled": 4, "faults": [], "seconds": 0,
    }  # fmt: skip
    assert "a dry run through the interpreter" in stdout


def test_kernel_benchmark_on_a_cpu_and_its_picture(tmp_path):
    script = [sys.executable, "benchmarks/bench_kernels.py", "--set", "tiny", "--out"]
    options = [str(tmp_path / "a.json"), "--case", "lookahead", "--only", "torch", "--no-steps"]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0"}
    subprocess.run([*script, *options], cwd=ROOT, env=env, check=True, capture_output=True)
    report = json.loads((tmp_path / "a.json").read_text())
    assert [r["variant"] for r in report["records"]] == [""]
    for record in report["records"]:
        assert record["check"] == {"ok": True, "flips": 0.0, "against": record["check"]["against"]}
        assert record["dtype"] == "torch.float32"
        # Two chunks of 64 x 64 and 70 of 1 x 64. Parameter and delta are read, a parameter is
        # written, and 16 bytes per chunk say where it lies.
        assert record["elements"] == 2 * 64 * 64 + 70 * 64
        assert record["bytes"] == 12 * record["elements"] + 16 * 72
        assert record["gb_per_s"] == pytest.approx(record["bytes"] / record["ms"]["p50"] / 1e6)
        assert record["floor_ms"] == pytest.approx(record["bytes"] / report["copy_gb_per_s"] / 1e6)
        assert record["launches"] is None
    draw = [sys.executable, "benchmarks/plot.py", str(tmp_path / "a.json"), "--out", str(tmp_path)]
    subprocess.run(draw, cwd=ROOT, check=True, capture_output=True)
    assert (tmp_path / "kernels.png").read_bytes().startswith(b"\x89PNG")


def environment():
    return gpu_suite.environment(tiny=True)


def in_own_process(tmp_path, monkeypatch, section, seconds=200.0):
    """Run a section that a script of its own defines, in place of the suite's."""
    script = tmp_path / "script.py"
    script.write_text(f"""
import os, sys, time
from pathlib import Path
from benchmarks import common, suite_process

def fail(message):
    raise RuntimeError(message)

def section(run):
{section}

value = lambda flag: sys.argv[sys.argv.index(flag) + 1]
suite_process.run_section(section, Path(value("--result")), float(value("--seconds")), True)
""")
    monkeypatch.setattr(suite_process, "SCRIPT", script)
    out = tmp_path / "out"
    out.mkdir()
    found = suite_process.in_own_process("kernels", out, seconds, True, environment())
    assert list(out.iterdir()) == []
    return found


def test_a_case_that_fails_costs_no_other(tmp_path, monkeypatch, capfd):
    """One raises, one breaks the GPU, one ends its process and one hangs: the others are done."""
    found = in_own_process(
        tmp_path,
        monkeypatch,
        """
    run.found["entered"] = run.found.get("entered", 0) + 1
    run.case("first", lambda: {"check": {"ok": True}})
    run.case("raises", lambda: fail("two\\nlines"))
    run.case("after", lambda: {"process": os.getpid()})
    common.unusable = lambda device: True
    run.case("breaks the GPU", lambda: fail("illegal address"))
    common.unusable = lambda device: False
    run.case("dies", os.abort)
    run.case("leaves", lambda: os._exit(3))
    run.case("hangs", lambda: time.sleep(60), seconds=0.5)
    run.case("last", lambda: {"process": os.getpid()})
    run.case("records nothing", lambda: None)
""",
    )
    records = {r["name"]: r for r in found["records"]}
    assert list(records) == [
        "first", "raises", "after", "breaks the GPU", "dies", "leaves", "hangs", "last",
    ]  # fmt: skip
    assert records["first"] == {"name": "first", "check": {"ok": True}}
    assert records["raises"]["fault"] == "RuntimeError: two"
    assert 'fail("two' in records["raises"]["trace"]
    assert records["breaks the GPU"]["fault"] == "RuntimeError: illegal address"
    assert records["dies"]["fault"] == "its process ended with signal SIGABRT"
    assert records["leaves"]["fault"] == "its process ended with status 3"
    assert records["hangs"]["fault"].startswith("hung: Timeout (0:00:00.500000)!")
    assert "script.py" in records["hangs"]["fault"]
    assert records["after"]["process"] != records["last"]["process"]
    # One process for the first, and one after each of those that were lost.
    assert (found["status"], found["entered"]) == ("faults", 5)
    assert not found.keys() & {"done", "at", "error"}
    assert "leaves: its process ended with status 3" in capfd.readouterr().out


RIGHT, WRONG = ({"name": "a", "check": {"ok": ok}} for ok in (True, False))
FAULT = {"name": "b", "fault": "it raised"}


@pytest.mark.parametrize(
    ("found", "status"),
    [
        ({"status": "ok", "records": [RIGHT]}, "ok"),
        ({"status": "ok", "records": [RIGHT, WRONG]}, "wrong"),
        ({"status": "ok", "records": [FAULT, RIGHT]}, "faults"),
        ({"status": "incomplete", "records": [FAULT, WRONG]}, "wrong"),
        ({"status": "ok", "check": {"ok": False}}, "wrong"),
        ({"status": "ok", "faults": ["a job"]}, "faults"),
        ({"status": "failed", "records": [FAULT]}, "failed"),
        ({"status": "ok", "left_out": ["a"], "records": [RIGHT]}, "incomplete"),
        ({"status": "incomplete"}, "incomplete"),
    ],
)
def test_status_of_a_section(found, status):
    assert suite_process._status(found) == status


def test_a_case_is_left_out_after_the_deadline_and_not_done_twice(tmp_path):
    run = suite_process.Run(True, tmp_path / "part.json", time.monotonic() + 60, {"done": ["a"]})
    run.case("a", os.abort)
    run.case("b", lambda: {"x": 1})
    run.deadline = 0.0
    run.case("c", os.abort)
    assert run.found == {
        "status": "incomplete", "done": ["a", "b"], "records": [{"name": "b", "x": 1}],
        "left_out": ["c"],
    }  # fmt: skip


def test_a_section_that_overruns_is_killed_with_its_records(tmp_path, monkeypatch):
    at_work, wait = tmp_path / "at work", suite_process.wait_or_kill

    def when_at_work(process, seconds):
        while not at_work.exists():
            time.sleep(0.1)
        return wait(process, 0.0)

    monkeypatch.setattr(suite_process, "wait_or_kill", when_at_work)
    section = f"""
    run.case("a", lambda: {{"x": 1}})
    run.case("b", lambda: (Path({str(at_work)!r}).touch(), time.sleep(90)))
"""
    found = in_own_process(tmp_path, monkeypatch, section, seconds=100.0)
    assert found == {
        "status": "incomplete", "records": [{"name": "a", "x": 1}],
        "error": "killed after 100 s, at b",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("section", "error"),
    [
        ("os.abort()", "ended with signal SIGABRT"),
        ("fail('no data')", "RuntimeError: no data"),
    ],
)
def test_a_section_that_fails_outside_of_its_cases_says_so(tmp_path, monkeypatch, section, error):
    found = in_own_process(tmp_path, monkeypatch, f"    run.case('a', dict)\n    {section}")
    assert found["status"] == "failed"
    assert found["records"] == [{"name": "a"}]
    assert found["error"].strip().endswith(error)


def test_after_a_fault_without_time_the_rest_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(suite_process, "MARGIN_S", 1000.0)
    section = """
    run.deadline = time.monotonic() + 60
    run.case("a", os.abort)
    run.case("b", dict)
"""
    found = in_own_process(tmp_path, monkeypatch, section)
    assert found["status"] == "faults"
    assert [r["name"] for r in found["records"]] == ["a"]
    assert found["left_out"] == ["what comes after the last fault"]


def test_sections_come_in_the_order_of_their_value():
    order = "environment smoke correctness compile kernels steps train sweeps autotune"
    assert list(gpu_suite.SECTIONS) == order.split()
    total = sum(seconds for seconds, _ in gpu_suite.SECTIONS.values())
    assert total + gpu_suite.PLOTS_S <= 525
    assert total + gpu_suite.PLOTS_S + gpu_suite.WARM_UP_S <= 575


def test_sections_run_in_order_and_have_the_time_of_those_not_wanted(tmp_path, monkeypatch):
    ran = []

    def instead(name, folder, seconds, tiny, env):
        ran.append((name, seconds))
        return {"status": "ok"}

    monkeypatch.setattr(gpu_suite, "in_own_process", instead)
    monkeypatch.setattr(gpu_suite, "warm_up", lambda env: 1.0)
    monkeypatch.setattr(gpu_suite, "_plots", lambda *arguments: "ok")
    gpu_suite.suite(tmp_path, ["steps", "smoke"], 200.0 + gpu_suite.PLOTS_S, False)
    assert [name for name, _ in ran] == ["smoke", "steps"]
    assert ran[0][1] == pytest.approx(200 * 35 / 80, abs=0.5)
    assert ran[1][1] == pytest.approx(200, abs=1.0)  # what the first has not used as well
    assert json.loads((tmp_path / "suite.json").read_text())["warm_up_seconds"] == 1.0


@pytest.mark.no_gpu
def test_without_a_gpu_the_suite_fails_and_says_why(tmp_path, capfd):
    status = gpu_suite.suite(tmp_path, ["environment"], 120.0, False)
    report = json.loads((tmp_path / "suite.json").read_text())
    assert report["sections"]["environment"]["status"] == "failed"
    assert "no CUDA device; --tiny is the dry run" in report["sections"]["environment"]["error"]
    assert report["sections"]["kernels"] == {"status": "skipped", "reason": "not asked"}
    assert status == 1
    assert "no CUDA device" in capfd.readouterr().out


def test_sections_are_skipped_when_time_is_short(tmp_path, monkeypatch):
    ran = []

    def instead(name, *arguments):
        ran.append(name)
        return {"status": "ok"}

    monkeypatch.setattr(gpu_suite, "in_own_process", instead)
    monkeypatch.setattr(gpu_suite, "run_tests", lambda *a, **o: {"status": "ok"})
    monkeypatch.setattr(gpu_suite, "warm_up", lambda env: 1.0)
    gpu_suite.suite(tmp_path, list(gpu_suite.SECTIONS), gpu_suite.PLOTS_S + 5.0, True)
    assert ran == []
    report = json.loads((tmp_path / "suite.json").read_text())
    assert {s["status"] for s in report["sections"].values()} == {"skipped"}
    assert "s were left" in report["sections"]["autotune"]["reason"]


@pytest.mark.parametrize(
    ("sections", "status"),
    [
        ({}, 0),
        ({"correctness": "wrong"}, 1),
        ({"correctness": "incomplete"}, 1),
        ({"kernels": "wrong"}, 1),
        ({"kernels": "failed"}, 1),
        ({"kernels": "faults"}, 1),
        ({"smoke": "incomplete"}, 1),
        ({"sweeps": "incomplete"}, 0),
    ],
)
def test_exit_status(tmp_path, monkeypatch, sections, status):
    def instead(name, *arguments):
        return {"status": sections.get(name, "ok")}

    monkeypatch.setattr(gpu_suite, "in_own_process", instead)
    tests = {"status": sections.get("correctness", "ok")}
    monkeypatch.setattr(gpu_suite, "run_tests", lambda *a, **o: tests)
    monkeypatch.setattr(gpu_suite, "warm_up", lambda env: 1.0)
    monkeypatch.setattr(subprocess, "run", lambda *a, **o: subprocess.CompletedProcess(a, 0))
    assert gpu_suite.suite(tmp_path, list(gpu_suite.SECTIONS), 500.0, True) == status
