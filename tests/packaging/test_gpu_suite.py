"""The GPU suite: a dry run without a GPU, its deadlines, and what it measures on."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import gpu_suite, llama_step, suite_report, suite_tests
from benchmarks.shapes import SETS

ROOT = Path(__file__).resolve().parents[2]
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


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_dry_run_from_a_bare_checkout(tmp_path):
    """Every section, through the interpreter, with none of the packages that may be missing."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(SITE)
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu_suite.py", "--tiny", "--out", str(out)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{tmp_path / 'site'}{os.pathsep}."},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
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
    kinds = {"encode", "apply", "subtract", "lookahead", "accumulate", "codec"}
    assert {r["kernel"] for r in kernels if r["implementation"] == "interpret"} == kinds
    assert {r["implementation"] for r in kernels} == {"interpret", "torch", "plain"}
    for section in ("kernels", "steps", "graph", "sweeps"):
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
    assert "a dry run through the interpreter" in done.stdout


def test_kernel_benchmark_on_a_cpu_and_its_picture(tmp_path):
    script = [sys.executable, "benchmarks/bench_kernels.py", "--set", "tiny", "--out"]
    options = [str(tmp_path / "a.json"), "--case", "lookahead", "--only", "torch", "--no-steps"]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0"}
    subprocess.run([*script, *options], cwd=ROOT, env=env, check=True, capture_output=True)
    report = json.loads((tmp_path / "a.json").read_text())
    assert [r["variant"] for r in report["records"]] == ["copy", "in place"]
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
    return {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1"}


def test_a_section_that_runs_out_of_time_keeps_what_it_has(tmp_path):
    found = gpu_suite.in_own_process(
        "kernels", tmp_path, gpu_suite.MARGIN_S + 0.1, True, environment()
    )
    assert found["status"] == "incomplete" or "killed after" in found["error"]
    if "left_out" in found:
        assert found["left_out"][-1] == "codec unpack k=8, signs, n=16: interpret, torch, plain"
    assert list(tmp_path.iterdir()) == []


def test_a_section_that_overruns_is_killed_with_its_records(tmp_path, monkeypatch):
    script = (
        "import json, sys, time\n"
        "path = sys.argv[sys.argv.index('--result') + 1]\n"
        "json.dump({'status': 'incomplete', 'records': [1]}, open(path, 'w'))\n"
        "time.sleep(60)\n"
    )
    (tmp_path / "slow.py").write_text(script)
    monkeypatch.setattr(gpu_suite, "__file__", str(tmp_path / "slow.py"))
    start = time.monotonic()
    found = gpu_suite.in_own_process("kernels", tmp_path, 3.0, True, environment())
    assert time.monotonic() - start < 30
    assert found == {"status": "incomplete", "records": [1], "error": "killed after 3 s"}


def test_a_section_that_crashes_says_so(tmp_path, monkeypatch):
    (tmp_path / "crash.py").write_text("import os; os.abort()")
    monkeypatch.setattr(gpu_suite, "__file__", str(tmp_path / "crash.py"))
    found = gpu_suite.in_own_process("kernels", tmp_path, 30.0, True, environment())
    assert found == {"status": "failed", "error": "ended with status -6"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
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
        ({"sweeps": "incomplete"}, 0),
    ],
)
def test_exit_status(tmp_path, monkeypatch, sections, status):
    def instead(name, *arguments):
        return {"status": sections.get(name, "ok")}

    monkeypatch.setattr(gpu_suite, "in_own_process", instead)
    tests = {"status": sections.get("correctness", "ok")}
    monkeypatch.setattr(gpu_suite, "run_tests", lambda *a, **o: tests)
    monkeypatch.setattr(subprocess, "run", lambda *a, **o: subprocess.CompletedProcess(a, 0))
    assert gpu_suite.suite(tmp_path, list(gpu_suite.SECTIONS), 500.0, True) == status


PASSING = """
import pytest
@pytest.mark.parametrize("what", ["a b", "c"])
def test_passes(what): pass
@pytest.mark.gpu
def test_skips(): pytest.skip("no")
"""


@pytest.mark.parametrize(
    ("extra", "status", "failed"),
    [
        ("", "ok", []),
        ("def test_fails(): assert 0", "wrong", ["tests/kernels/test_x.py::test_fails"]),
        ("def test_hangs():\n  import time; time.sleep(60)", "incomplete", []),
        ("def test_dies():\n  import os; os._exit(3)", "incomplete", []),
    ],
)
def test_outcomes_of_tests(tmp_path, extra, status, failed):
    (tmp_path / "tests/kernels").mkdir(parents=True)
    (tmp_path / "tests/kernels/test_x.py").write_text(PASSING + extra)
    (tmp_path / "tests/kernels/test_aot.py").write_text("def test_compiles(): assert 0")
    seconds = 8.0 if "hangs" in extra else 60.0
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}
    found = suite_tests.run_tests(tmp_path, tmp_path / "log", seconds, env, quick=False)
    assert (found["status"], found["failed"]) == (status, failed)
    assert found["outcomes"]["passed"] == 2
    assert found["outcomes"]["skipped"] == 1
    assert found["tests"] == 3 + bool(extra)
    assert "test_passes[a b] PASSED" in (tmp_path / "log").read_text()


def test_tests_that_cannot_be_collected_are_a_failure(tmp_path):
    (tmp_path / "tests/kernels").mkdir(parents=True)
    (tmp_path / "tests/kernels/test_x.py").write_text("import nothing_of_this_name")
    found = suite_tests.run_tests(tmp_path, tmp_path / "log", 60.0, dict(os.environ), quick=False)
    assert found["status"] == "failed"
    assert "nothing_of_this_name" in (tmp_path / "log").read_text()


def test_table_shows_figures_beside_their_aims():
    def step(name, p50):
        return {"name": name, "ms": {"p50": p50}, "floor_ms": 1.0}

    steps = [
        step("AdamW fused, fp32", 8.0),
        step("AdamW fused, bf16", 4.0),
        step("Distro k=8, fused look-ahead", 6.0),
        step("DeMo k=8", 5.0),
        step("plain DeMo k=8", 150.0),
    ]
    kernel = {
        "kernel": "encode", "variant": "k=8", "implementation": "triton", "ms": {"p50": 3.0},
        "target_us_per_million": 2.9, "us_per_million": 2.427, "copy_fraction": 0.81,
    }  # fmt: skip
    sections = {name: {"status": "skipped", "reason": "not asked"} for name in gpu_suite.SECTIONS}
    sections["steps"] = {"status": "ok", "records": steps}
    sections["kernels"] = {"status": "ok", "records": [kernel]}
    text = suite_report.table({"tiny": False, "sections": sections})
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "encode k=8 2.43 us/M 2.9 us/M; 81 % of the copy" in lines
    assert "Distro k=8, fused look-ahead / AdamW fused, fp32 0.75 <= 1" in lines
    assert "Distro k=8, fused look-ahead / AdamW fused, bf16 1.50 <= 1.3" in lines
    assert "plain DeMo k=8 / DeMo k=8 30.00 >= 25" in lines
    assert "correctness skipped: not asked" in lines


def model_shapes(config):
    import transformers

    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    return Counter(tuple(p.shape) for p in model.parameters())


def test_layers_are_those_of_the_models():
    import transformers

    llama = llama_step.llama(llama_step.LLAMA_1B, 2048)
    assert Counter(SETS["1.2B"]) == model_shapes(llama)
    assert Counter(SETS["125M"]) == model_shapes(transformers.GPT2Config())
    eight = transformers.LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8,
    )  # fmt: skip
    assert Counter(SETS["8B"]) == model_shapes(eight)
