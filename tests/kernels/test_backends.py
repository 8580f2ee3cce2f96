"""Which backend runs: `auto`, the environment variable, and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
import types

import pytest
import torch

from psyche_fast.distro import Distro
from psyche_fast.distro.chunks import Layout, ParameterLayout
from psyche_fast.kernels import backends
from psyche_fast.kernels.backends import explain, resolve_backend

CPU = torch.device("cpu")
SETTINGS = {"compression_decay": 0.9, "compression_topk": 2, "compression_chunk": 8}


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    monkeypatch.delenv(backends.ENVIRONMENT, raising=False)


def test_auto_takes_torch_on_a_cpu_and_says_why():
    assert explain(CPU) == ("torch", "there are no Triton kernels for cpu")


def test_auto_takes_triton_on_a_gpu():
    pytest.importorskip("triton")
    assert explain(torch.device("cuda"))[0] == "triton"


def test_auto_without_triton_takes_torch_and_says_so(monkeypatch):
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    name, reason = explain(torch.device("cuda"))
    assert name == "torch"
    assert "triton is not installed" in reason
    with pytest.raises(ValueError, match="backend='triton': triton is not installed"):
        explain(torch.device("cuda"), "triton")


def test_a_class_of_chunks_that_falls_back_on_a_gpu_is_said_once_with_the_reason(
    monkeypatch, caplog
):
    pytest.importorskip("triton")
    backends._warn_of_reference.cache_clear()
    gpu = torch.device("cuda", 0)

    def choose(h, w, backend="auto"):
        plan = types.SimpleNamespace(device=gpu, h=h, w=w, dtype=torch.float32, is_transformed=True)
        return backends.backend_of(plan, backend)[0]

    assert choose(64, 64) == "triton"
    assert choose(128, 128) == choose(128, 128) == choose(1, 128) == "torch"
    assert choose(128, 128, "torch") == "torch"  # asked for: no surprise
    said = [record.getMessage() for record in caplog.records]
    assert [text.partition("GPU: ")[2] for text in said] == [
        "chunks are 128 x 128, the kernels take sides of up to 64",
        "chunks are 1 x 128, the kernels take sides of up to 64",
    ]
    caplog.clear()
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    assert choose(64, 64) == choose(64, 64) == "torch"
    (record,) = caplog.records
    assert "triton is not installed" in record.getMessage()


@pytest.mark.no_gpu
def test_the_environment_decides_for_auto(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv(backends.ENVIRONMENT, "interpret")
    parameter = torch.zeros(8, 8, requires_grad=True)
    assert Distro({"p": parameter}, **SETTINGS).backends == ("interpret",)
    assert Distro({"p": parameter}, **SETTINGS, backend="torch").backends == ("torch",)
    monkeypatch.setenv(backends.ENVIRONMENT, "fast")
    with pytest.raises(ValueError, match="PSYCHE_FAST_KERNELS=fast: backend must be one of"):
        Distro({"p": parameter}, **SETTINGS)


def test_triton_on_a_cpu_is_refused(monkeypatch):
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match=r"the Triton kernels need a CUDA device.*on cpu"):
        resolve_backend("triton")
    monkeypatch.setenv(backends.ENVIRONMENT, "triton")
    with pytest.raises(ValueError, match="PSYCHE_FAST_KERNELS=triton: the Triton kernels need"):
        resolve_backend("auto")


@pytest.mark.no_gpu
@pytest.mark.parametrize(
    ("shape", "dtype", "chunk", "message"),
    [
        ((8, 8), torch.float64, 8, "parameters are torch.float64"),
        ((128, 128), torch.float32, 128, "chunks are 128 x 128"),
    ],
)
def test_a_class_that_the_kernels_cannot_take_is_named(shape, dtype, chunk, message):
    pytest.importorskip("triton")
    layout = ParameterLayout.of("p", shape, dtype, CPU, compression_chunk=chunk, compression_topk=2)
    plan = Layout([layout]).plans[0]
    with pytest.raises(ValueError, match=message):
        backends.backend_of(plan, "interpret")
    assert backends.backend_of(plan, "auto")[0] == "torch"


def test_an_interpreter_that_was_asked_for_too_late_is_refused(monkeypatch):
    """Triton decides when its functions are defined, its library's among them."""
    language = pytest.importorskip("triton.language")
    from triton.runtime.jit import JITFunction

    monkeypatch.setattr(language, "sum", object.__new__(JITFunction))
    with pytest.raises(ValueError, match="triton was imported before its interpreter was asked"):
        explain(CPU, "interpret")


def test_the_interpreter_is_started_in_time():
    pytest.importorskip("triton")
    code = f"""
import torch
from psyche_fast.distro import Distro
p = torch.randn(8, 8, requires_grad=True)
p.grad = torch.randn(8, 8)
distro = Distro({{"p": p}}, **{SETTINGS!r}, backend="interpret")
print(len(distro.generate(None, 0.1, 0.1)))
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "1", done.stderr
