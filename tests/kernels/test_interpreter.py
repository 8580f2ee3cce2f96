"""The repairs of Triton's interpreter: right with them, and wrong without, so still needed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

SCRIPT = """
import numpy as np, torch, triton, triton.language as tl

@triton.jit
def product(a, b, c):
    i = tl.arange(0, 16)[:, None]
    j = tl.arange(0, 16)[None, :]
    tl.store(c + i * 16 + j, tl.dot(tl.load(a + i * 16 + j), tl.load(b + i * 16 + j)))

@triton.jit
def narrow(x, y):
    i = tl.arange(0, 1024)
    tl.store(y + i, tl.load(x + i).to(tl.bfloat16))

def tell(when):
    torch.manual_seed(0)
    a, b = torch.randn(2, 16, 16).bfloat16()
    c = torch.empty(16, 16)
    product[(1,)](a, b, c)
    error = (c.double() - a.double() @ b.double()).abs().max()
    print(when, "dot", "right" if error < 1e-5 else "wrong")
    x = torch.cat([torch.randn(1020), torch.tensor([float("inf"), -float("inf"), 1e-40, 0.0])])
    y = torch.empty(1024, dtype=torch.bfloat16)
    narrow[(1,)](x, y)
    print(when, "rounding", "right" if torch.equal(y, x.bfloat16()) else "wrong")

tell("original")
from psyche_fast.kernels.interpreter import repair
repair()
tell("repaired")
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    # @triton.jit reads its function's source from a file.
    script = tmp_path_factory.mktemp("interpreter") / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


@pytest.mark.parametrize("operation", ["dot", "rounding"])
def test_repaired_interpreter_is_right(outcomes, operation):
    assert f"repaired {operation} right" in outcomes


@pytest.mark.parametrize("operation", ["dot", "rounding"])
def test_repair_is_still_needed(outcomes, operation):
    assert f"original {operation} wrong" in outcomes, (
        "Triton's interpreter has mended this: take the repair out of kernels/interpreter.py"
    )
