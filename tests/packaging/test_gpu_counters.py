"""`gpu_counters.py`: what its tools say, and its dry run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import counter_work, gpu_counters
from benchmarks.gpu_counters import Piece

ROOT = Path(__file__).resolve().parents[2]
NCU = """\
==PROF== Connected to process 4711 (/usr/bin/python3)
==PROF== Profiling "encode_tiles": 0%....50%....100% - 9 passes
"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size",\
"Grid Size","Device","CC","Section Name","Metric Name","Metric Unit","Metric Value"
"0","4711","python3","127.0.0.1","encode_tiles","1","7","(128, 1, 1)","(528, 1, 1)","0","9.0",\
"Command line profiler metrics","dram__bytes_read.sum","Gbyte","7.41"
"0","4711","python3","127.0.0.1","encode_tiles","1","7","(128, 1, 1)","(528, 1, 1)","0","9.0",\
"Command line profiler metrics","gpu__time_duration.sum","usecond","3,604.50"
"0","4711","python3","127.0.0.1","encode_tiles","1","7","(128, 1, 1)","(528, 1, 1)","0","9.0",\
"Command line profiler metrics","lts__t_sectors_op_red.sum","sector","1,024"
"0","4711","python3","127.0.0.1","encode_tiles","1","7","(128, 1, 1)","(528, 1, 1)","0","9.0",\
"Command line profiler metrics","dram__bytes_write.sum","byte","n/a"
"1","4711","python3","127.0.0.1","encode_tiles","1","7","(128, 1, 1)","(528, 1, 1)","0","9.0",\
"Command line profiler metrics","dram__bytes_read.sum","byte","1"
""".replace(",\\\n", ",")
NAMES = ("dram__bytes_read.sum", "gpu__time_duration.sum", "lts__t_sectors_op_red.sum")
WORKED = '{"bytes": 100, "elements": 10, "launches": 3}\n'


def test_metrics_of_the_first_launch_in_bytes_and_nanoseconds():
    metrics = gpu_counters.metrics_of(NCU)
    assert metrics == pytest.approx(dict(zip(NAMES, (7.41e9, 3604500.0, 1024.0), strict=True)))
    assert gpu_counters.metrics_of("") == {}


@pytest.mark.parametrize(
    ("text", "names", "status", "fault"),
    [
        (NCU, NAMES, "ok", None),
        (NCU, (*NAMES, "dram__bytes_write.sum"), "faults", None),
        ("==ERROR== Failed to find metric abc\n", NAMES, "faults", "find metric abc"),
        ("==ERROR== ERR_NVGPUCTRPERM - The user\n==END==", NAMES, "faults", "ERR_NVGPUCTRPERM"),
    ],
)
def test_what_ncu_does_not_know_is_a_fault(tmp_path, text, names, status, fault):
    log = tmp_path / "ncu.csv"
    log.write_text(text)
    found = gpu_counters.read_profile(WORKED, log=log, names=names)
    assert found["status"] == status
    assert found["least_bytes"] == 100
    if status == "faults":
        assert found["missing"] == [name for name in names if name not in found["metrics"]]
        assert (fault or "") in found["fault"]


REPORT = "========= COMPUTE-SANITIZER\n"


@pytest.mark.parametrize(
    ("report", "output", "expected"),
    [
        (
            REPORT + "========= ERROR SUMMARY: 0 errors\n",
            "tests/a.py::test_x[1] PASSED\ntests/a.py::test_y PASSED",
            {"status": "ok", "errors": 0, "outcomes": {"passed": 2}},
        ),
        (
            REPORT + "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n",
            "tests/a.py::test_x PASSED",
            {"status": "ok", "errors": 0, "outcomes": {"passed": 1}},
        ),
        (
            REPORT + "========= Invalid __global__ read of size 4\n"
            "========= ERROR SUMMARY: 1 error\n",
            "tests/a.py::test_x PASSED",
            {"status": "wrong", "errors": 1, "outcomes": {"passed": 1}},
        ),
        (
            REPORT + "========= ERROR SUMMARY: 0 errors\n",
            "tests/a.py::test_x FAILED",
            {"status": "wrong", "errors": 0, "outcomes": {"failed": 1}},
        ),
        (
            REPORT + "========= Error: device not supported\n",
            "",
            {
                "status": "failed", "outcomes": {},
                "fault": "========= Error: device not supported",
            },
        ),
    ],
)  # fmt: skip
def test_what_a_sanitizer_has_found(tmp_path, report, output, expected):
    log = tmp_path / "report"
    log.write_text(report)
    found = gpu_counters.read_sanitizer(output, log=log)
    first = found.pop("first", None)
    assert found == expected
    assert (first is not None) == (expected.get("errors") == 1)


def test_repeated_runs_may_not_differ_and_other_machines_may():
    said = json.dumps({"differ": {"a": 0, "b": 3}})
    assert gpu_counters.read_json(said, exact=True)["status"] == "wrong"
    assert gpu_counters.read_json(said)["status"] == "ok"
    failed = gpu_counters.read_json("Traceback\nRuntimeError: no\n")
    assert failed == {"status": "failed", "fault": "RuntimeError: no"}


def python(name, code, **options):
    command = [sys.executable, "-c", code]
    return Piece(name, command, gpu_counters.read_json, options.pop("seconds", 60.0), **options)


def test_pieces_that_fail_hang_or_lack_their_tool_cost_no_other(tmp_path, monkeypatch):
    unknown = "print('==ERROR== Failed to find metric x')"
    todo = [
        python("good", "print('{\"a\": 1}')"),
        python("raises", "1 / 0"),
        python("hangs", "import time; time.sleep(60)", seconds=1.0),
        python("ends", "print('{}'); raise SystemExit(3)"),
        Piece("lacks", ["no-such-tool"], gpu_counters.read_json, 9.0, tool="no-such-tool"),
        python("unknown", unknown, otherwise=(python("one by one", "print('{}')"),)),
        python("last", "print('{\"a\": 2}')"),
    ]
    monkeypatch.setattr(gpu_counters, "pieces", lambda folder, tiny: iter(todo))
    monkeypatch.setattr(gpu_counters, "warm_up", lambda env: 0.0)
    assert gpu_counters.run(tmp_path, 120.0, False) == 1
    report = json.loads((tmp_path / "counters.json").read_text())["pieces"]
    assert report == {
        "good": {"status": "ok", "a": 1},
        "raises": {"status": "failed", "fault": "ZeroDivisionError: division by zero"},
        "hangs": {"status": "failed", "fault": "killed after 1 s"},
        "ends": {"status": "failed", "fault": "status 3"},
        "lacks": {"status": "missing", "reason": "no no-such-tool on this machine"},
        "unknown": {"status": "failed", "fault": "==ERROR== Failed to find metric x"},
        "one by one": {"status": "ok"},
        "last": {"status": "ok", "a": 2},
    }
    assert (tmp_path / "raises.log").read_text().startswith("Traceback")


def test_what_is_missing_or_late_is_no_failure(tmp_path, monkeypatch):
    todo = [
        Piece("lacks", ["no-such-tool"], gpu_counters.read_json, 9.0, tool="no-such-tool"),
        python("late", "1 / 0"),
    ]
    monkeypatch.setattr(gpu_counters, "pieces", lambda folder, tiny: iter(todo))
    monkeypatch.setattr(gpu_counters, "warm_up", lambda env: 0.0)
    assert gpu_counters.run(tmp_path, 0.5, False) == 0
    report = json.loads((tmp_path / "counters.json").read_text())["pieces"]
    assert report["late"] == {"status": "skipped", "reason": "no time was left"}


def test_commands_name_kernels_and_tests_that_there_are(tmp_path):
    pieces = list(gpu_counters.pieces(tmp_path, tiny=False))
    names = [piece.name for piece in pieces]
    assert len(set(names)) == len(names)
    sources = "".join(p.read_text() for p in (ROOT / "psyche_fast/kernels/triton").glob("*.py"))
    assert gpu_counters.PROFILED.keys() == counter_work.KERNELS.keys()
    for kernel in gpu_counters.PROFILED.values():
        assert f"def {kernel}(" in sources
    for _, file, _ in gpu_counters.SANITIZED:
        assert (ROOT / file).exists()
    profiles = [piece for piece in pieces if piece.tool == "ncu"]
    for piece in profiles:
        apart = [one.command[one.command.index("--metrics") + 1] for one in piece.otherwise]
        assert ",".join(apart) == piece.command[piece.command.index("--metrics") + 1]
    for piece in pieces:
        if piece.tool == "compute-sanitizer":
            assert piece.env["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"


def test_a_tool_is_found_on_the_search_path(tmp_path, monkeypatch):
    tool = tmp_path / "ncu"
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_counters.locate("ncu") == str(tool)
    assert gpu_counters.locate("no-such-tool") is None


def test_bits_that_differ_are_counted(tmp_path, monkeypatch):
    """Of results that change from run to run, and of another machine's."""
    runs = iter([[1.0, 0.0, 2.0], [1.0, -0.0, 2.0], [1.0, 0.0, 3.0], [1.0, 0.0, 2.0]])
    made = lambda *_: {"x": torch.tensor(next(runs))}  # noqa: E731
    monkeypatch.setattr(counter_work, "made", made)
    bits = partial(counter_work.bits, tiny=True)
    one, other = tmp_path / "one.pt", tmp_path / "other.pt"
    assert bits(one, None, repeats=3)["differ"] == {"x": 2}
    torch.save({"x": torch.tensor([1.0, 5.0, 5.0])}, other)
    found = bits(one, other, repeats=1)
    assert (found["differ"], found["of"]) == ({"x": 2}, {"x": 3})


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_dry_run(tmp_path):
    """All that needs no tool, through the interpreter."""
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu_counters.py", "--tiny", "--out", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    report = json.loads((tmp_path / "counters.json").read_text())["pieces"]
    for name in ("bits of repeated runs", "bits against the interpreter"):
        assert set(report[name]["differ"].values()) == {0}
        assert len(report[name]["of"]) == 6
    assert len(report["matrix product after encode"]["ms"]) == 3
    skipped = [name for name, found in report.items() if found["status"] == "skipped"]
    assert len(skipped) == 3 + len(gpu_counters.SANITIZED)
    for part in ("ncu --clock-control none", "dram__bytes_read.sum", "--tool memcheck"):
        assert part in done.stdout
