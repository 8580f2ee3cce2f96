"""`psyche-fast bench`: its figures, its file, what it says of a slower kernel."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
import pytest_benchmark.cli
import torch

from psyche_fast.bench import exchange, results, suite, training
from psyche_fast.cli import main
from psyche_fast.kernels.reference import accumulate as twin

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
QUICK = ("--layers", "tiny", "--milliseconds", "2", "--rounds", "2")


def bench(*arguments: str) -> None:
    main(["bench", *QUICK, *arguments])


def report(copy: float = 10.0, product: float = 100.0, **times: list[float]) -> suite.Report:
    environment = {"gpu": None, "cpu": "a", "threads": 1, "commit": "abc", "date": "today"}
    found = [suite.Found("kernel", name, list(t), 0.5, {}) for name, t in times.items()]
    return suite.Report(environment, {"copy_gb_per_s": copy, "product_gflop_per_s": product}, found)


@pytest.mark.parametrize(
    ("now", "speeds", "change", "verdict"),
    [
        ([1.0, 1.1, 1.2], {}, 0.0, ""),
        ([1.05, 1.3, 1.6], {}, 0.3 / 1.1 - 0.1 / 1.1 + 0.0, ""),  # its fastest call is as before
        ([2.0, 2.2, 2.4], {}, 1.0, "slower"),
        # The machine is half as fast as then for both, and so is the kernel.
        ([2.0, 2.2, 2.4], {"copy": 5.0, "product": 50.0}, 0.0, ""),
        # ... for one of them, which may be what the kernel depends on.
        ([2.0, 2.2, 2.4], {"copy": 5.0}, 0.0, ""),
        ([4.0, 4.4, 4.8], {"copy": 5.0, "product": 50.0}, 1.0, "slower"),
        # On a machine that is twice as fast the same time is a regression.
        ([1.0, 1.1, 1.2], {"copy": 20.0, "product": 200.0}, 1.0, "slower"),
        ([0.4, 0.44, 0.5], {}, -0.6, "faster"),
        ([0.4, 0.44, 0.5], {"copy": 25.0, "product": 250.0}, 0.0, ""),
    ],
)
def test_what_is_slower_by_more_than_the_noise(now, speeds, change, verdict):
    then = report(kernel=[1.0, 1.1, 1.2])
    [found] = results.compare(then, report(kernel=now, **speeds))
    assert found.verdict == verdict
    assert found.change == pytest.approx(change, abs=0.011)


def test_only_what_both_have_is_compared():
    then, now = report(a=[1.0], b=[1.0]), report(b=[1.0], c=[1.0])
    assert [c.name for c in results.compare(then, now)] == ["kernel: b"]


def test_several_rounds_are_one_report():
    whole = results.merged([report(a=[1.0]), report(copy=12.0, a=[3.0], b=[2.0])])
    assert whole.yardsticks == {"copy_gb_per_s": 12.0, "product_gflop_per_s": 100.0}
    assert {f.name: f.times for f in whole.found} == {"a": [1.0, 3.0], "b": [2.0]}


def test_a_file_is_read_as_it_was_written_and_by_pytest_benchmark(tmp_path, monkeypatch, capsys):
    path = tmp_path / "deep" / "a.json"
    written = report(encode=[4.0, 2.0, 3.0, 1.0], pack=[1.0])
    results.write(path, written, "tiny")
    read = results.read(path, "tiny")
    assert [(f.full_name, sorted(f.times)) for f in read.found] == [
        ("kernel: encode", pytest.approx([1.0, 2.0, 3.0, 4.0])),
        ("kernel: pack", pytest.approx([1.0])),
    ]
    assert read.yardsticks == written.yardsticks
    stats = json.loads(path.read_text())["benchmarks"][0]["stats"]
    assert stats["median"] == pytest.approx(2.5e-3)
    assert stats["stddev"] == pytest.approx(statistics.stdev([1e-3, 2e-3, 3e-3, 4e-3]))
    other = tmp_path / "b.json"
    results.write(other, report(encode=[1.0]), "tiny")
    monkeypatch.setattr(sys, "argv", ["pytest-benchmark", "compare", str(path), str(other)])
    pytest_benchmark.cli.main()
    shown = capsys.readouterr().out
    assert "encode" in shown
    assert "2.5000" in shown


@pytest.mark.parametrize("text", ["", "[]", '{"benchmarks": []}', '{"machine_info": {}}', "\x00"])
def test_another_file_is_refused_in_one_line(tmp_path, capsys, text):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(SystemExit) as stopped:
        bench("--compare", str(path))
    assert stopped.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"psyche-fast: error: --compare {path}: wanted a file that")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fail-slower", "5"], "--fail-slower wants --compare"),
        (["--layers", "huge"], "--layers must be one of tiny, small"),
        (["--case", "nothing like it"], "--case 'nothing like it' is in no case's name"),
        (["--compare", "no-such-commit"], "neither a file nor a commit of the checkout"),
        (["--device", "tpu"], "--device: wanted auto, cpu"),
    ],
)
def test_mistakes_are_one_line(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        bench(*arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


class Cells(HTMLParser):
    """Texts of a page's cells."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())


def test_a_kernel_that_has_become_slower_is_seen(tmp_path, capsys, monkeypatch):
    file, page = tmp_path / "then.json", tmp_path / "now.html"
    cases = ("--case", "accumulate middle")
    bench(*cases, "--out", str(file))
    first = capsys.readouterr().out
    assert "kernel: accumulate middle" in first
    right = twin.accumulate

    def slow(*arguments):
        time.sleep(0.05)
        return right(*arguments)

    monkeypatch.setattr(twin, "accumulate", slow)
    with pytest.raises(SystemExit) as stopped:
        bench(*cases, "--compare", str(file), "--fail-slower", "50", "--page", str(page))
    assert stopped.value.code == 1
    captured = capsys.readouterr()
    assert "kernel: accumulate middle" in captured.err.splitlines()[-1]
    cells = Cells()
    cells.feed(page.read_text())
    at = cells.texts.index("kernel: accumulate middle")
    assert any(text.endswith("slower") for text in cells.texts[at : at + 9])
    assert "http" not in page.read_text(), "it needs nothing from elsewhere"


def test_nothing_is_timed_that_is_wrong(capsys, monkeypatch):
    def wrong(plan, sums, gradients, fresh, squares):
        for total in sums:
            total.zero_()

    monkeypatch.setattr(twin, "accumulate", wrong)
    with pytest.raises(SystemExit) as stopped:
        bench("--case", "accumulate middle")
    assert stopped.value.code == 1
    assert "accumulate middle is wrong, so nothing is timed" in capsys.readouterr().err


def test_names_are_unique_and_the_usual_ones_are_there():
    every = list(suite.cases("tiny", CPU))
    names = [case.full_name for case in every]
    assert len(set(names)) == len(names)
    usual = suite.chosen(every, (), CPU)
    assert {case.group for case in usual} == set(suite.GROUPS)
    assert {c.name for c in usual if c.group in ("kernel", "step")} == suite._ON_A_CPU
    assert suite.chosen(every, ("training", "encode k=8"), CPU) == [
        case for case in every if "training" in case.full_name or "encode k=8" in case.name
    ]


@pytest.mark.parametrize("name", training.CASES)
def test_a_step_of_training_counts_its_flops(name, monkeypatch):
    tiny = {"width": 64, "layers": 1, "vocabulary": 128, "rows": 2, "length": 16}
    monkeypatch.setitem(training._SIZES, "cpu", tiny)
    with training.step(name, CPU) as step:
        step.run()
        width, tokens = 64, 2 * 16
        dense = 4 * width**2 + 3 * width * (8 * width // 3 // 64 * 64) + width * 128
        assert step.tokens == tokens
        # Two per weight and token forward, four backward; attention's are not counted here.
        assert 6 * dense * tokens <= step.flops < 7 * dense * tokens


@pytest.mark.processes
def test_two_replicas_exchange_results():
    with exchange.Pair(exchange.RESULTS, "tiny") as pair:
        times = pair.times(1.0)
        assert len(times) >= 3
        assert all(ms > 0 for ms in times)
        # Two chunks of 64 x 64 with 8 indices of 12 bits and a sign, 70 of 1 x 64 with 8 of 6 bits,
        # and a header.
        wire = 2 * 8 * 13 // 8 + 70 * 8 * 7 // 8
        assert 0 < pair.size - wire < 200
        assert pair.gb_per_s > 0


@pytest.mark.slow
@pytest.mark.processes
def test_another_commit_is_compared_in_turns(tmp_path, capsys):
    git = ["git", "cat-file", "-e", "HEAD:psyche_fast/bench/command.py"]
    if subprocess.run(git, cwd=ROOT, capture_output=True, check=False).returncode:
        pytest.skip("needs a checkout whose last commit has `bench`")
    bench("--case", "accumulate middle", "--compare", "HEAD", "--rounds", "1")
    lines = capsys.readouterr().out.splitlines()
    [line] = [line for line in lines if line.startswith("kernel: accumulate middle")]
    assert len(line.split()) >= 10, "time and floor, then the other's time and the change"
