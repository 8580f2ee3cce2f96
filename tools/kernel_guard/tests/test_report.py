"""`make kernels`: what it prints, and when it ends with an error."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json

import pytest
import torch

from tools.kernel_guard import __main__ as program
from tools.kernel_guard import limits
from tools.kernel_guard import report as command
from tools.kernel_guard.aot import Measurement

SMALL = "tools.kernel_guard.tests.small_kernels"

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


@pytest.fixture(autouse=True)
def _no_backend_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PSYCHE_FAST_KERNELS", raising=False)


@pytest.fixture
def no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "triton" else find(name)
    )


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = 0
    try:
        program.main(list(arguments))
    except SystemExit as end:
        status = int(end.code or 0)
    out, err = capsys.readouterr()
    return status, out, err


@needs_triton
def test_tables_say_which_path_runs_and_what_every_kernel_costs(capsys):
    command.report(kernels=["product"], targets=["sm_90", "gfx942"], provider=SMALL)
    lines = capsys.readouterr().out.splitlines()
    if not torch.cuda.is_available():
        assert lines[0] == "kernels     torch: there are no Triton kernels for cpu"
        assert lines[1] == "device      cpu"
    assert lines[2].endswith(f", torch {torch.__version__}")
    start = next(i for i, line in enumerate(lines) if line.startswith("sm_90 (H100, H200)"))
    assert lines[start].split()[-7:] == [
        "registers", "spills", "B", "shared", "B", "instr/tile", "MMAs",
    ]  # fmt: skip
    small, wide = lines[start + 1 : start + 3]
    name, size, registers, spills, shared, instructions, mma = small.split()
    assert (name, size, spills, shared, mma) == ("product", "64", "0", "16,384", "4")
    assert 32 <= int(registers) <= 128
    assert 400 <= int(instructions) <= 1000
    assert wide.startswith("product wide  does not run: needs 262144 bytes of shared memory")
    amd = next(i for i, line in enumerate(lines) if line.startswith("gfx942 (MI300X)"))
    assert lines[amd + 1].split()[-2] == "-"  # instructions are not counted there


@needs_triton
def test_a_limit_that_is_exceeded_ends_in_an_error_that_names_it(capsys, tmp_path):
    version = importlib.metadata.version("triton")
    limits.write(limits.Limits(version), tmp_path)  # of which a part is taken
    some = {"kernels": ["product 64"], "targets": ["sm_90"], "provider": SMALL, "folder": tmp_path}
    command.report(update_limits=True, check=True, **some)
    out = capsys.readouterr().out
    assert f"wrote {limits.path_of(version, tmp_path)}" in out
    assert f"1 compilations are within the limits (those of Triton {version})" in out
    taken = limits.read_all(tmp_path)[version]
    line = taken.cases["product 64"]["sm_90"]
    assert line["mma"] == 4

    line["registers"] = 20
    limits.write(taken, tmp_path)
    with pytest.raises(RuntimeError, match="limits of the kernels are exceeded"):
        command.report(check=True, as_json=True, **some)
    report = json.loads(capsys.readouterr().out)
    assert report["backend"] in ("torch", "triton")
    [measured] = report["measurements"]
    assert report["faults"] == [
        f"product 64 on sm_90: registers {measured['registers']}, at most 20"
    ]
    assert measured["mma"] == 4


@needs_triton
def test_under_a_triton_without_limits_it_says_what_it_is_held_to(capsys, tmp_path, monkeypatch):
    one = Measurement("product", "64", "sm_90", registers=40, spills=0, shared=0, mma=4)
    limits.write(limits.updated(limits.Limits(), [one], "3.0.0", whole=True), tmp_path)
    slower = dataclasses.replace(one, registers=50)  # 44 and 15 %
    monkeypatch.setattr(command, "_measure", lambda *_: [slower])
    command.report(kernels=["product"], check=True, folder=tmp_path)
    assert "are within the limits (of any Triton, and slack)" in capsys.readouterr().out


@needs_triton
def test_lines_of_a_kernel_add_up_to_what_it_costs(capsys):
    command.report(lines="product 64", provider=SMALL)
    out = capsys.readouterr().out
    table = out[out.index("instr/tile") :].splitlines()
    counts = [float(line.split()[0].replace(",", "")) for line in table[1:-1]]
    assert counts == sorted(counts, reverse=True)
    assert sum(counts) == float(table[-1].split()[0].replace(",", ""))
    [store] = [line for line in table if "tl.store(out + i[:, None] * N" in line]
    assert "small_kernels.py:" in store


@needs_triton
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "sm_75"], "--target must be one of sm_80, sm_90, sm_100, sm_120, gfx942"),
        (["--kernel", "sorting"], "--kernel 'sorting': no such kernel; there are: "),
        (["--lines", "sorting"], "--lines 'sorting': no such kernel; there are: "),
        (["--lines", "encode", "--target", "mi300"], "--target must be one of sm_80"),
    ],
)
def test_what_there_is_not_is_said_in_one_line(capsys, arguments, message):
    status, _, err = run(capsys, *arguments)
    assert status == 2
    assert message in err
    assert len(err.splitlines()) == 1


@pytest.mark.usefixtures("no_triton")
@pytest.mark.parametrize("option", ["--check", "--update-limits", "--lines=encode"])
def test_without_triton_nothing_can_be_checked(capsys, option):
    before = limits.read_all()
    status, _, err = run(capsys, option)
    assert status == 2
    assert "triton is not installed, so nothing can be compiled" in err
    assert limits.read_all() == before
