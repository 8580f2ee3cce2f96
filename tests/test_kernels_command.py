"""`psyche-fast kernels`: which path runs here, and why."""

from __future__ import annotations

import pytest
import torch

from psyche_fast import cli


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = 0
    try:
        cli.main(["kernels", *arguments])
    except SystemExit as end:
        status = int(end.code or 0)
    out, err = capsys.readouterr()
    return status, out, err


def test_it_says_which_path_runs_here_and_why(capsys, monkeypatch):
    monkeypatch.delenv("PSYCHE_FAST_KERNELS", raising=False)
    status, out, _ = run(capsys)
    lines = out.splitlines()
    assert status == 0
    if not torch.cuda.is_available():
        assert lines[:2] == [
            "kernels     torch: there are no Triton kernels for cpu",
            "device      cpu",
        ]
    assert lines[2].endswith(f", torch {torch.__version__}")


def test_a_backend_that_cannot_run_is_an_error(capsys, monkeypatch):
    monkeypatch.setenv("PSYCHE_FAST_KERNELS", "cuda")
    status, _, err = run(capsys)
    assert status == 2
    assert "PSYCHE_FAST_KERNELS=cuda: backend must be one of" in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_tuning_without_a_gpu_is_refused_in_one_line(capsys):
    status, _, err = run(capsys, "--autotune")
    assert status != 0
    assert len(err.splitlines()) == 1
