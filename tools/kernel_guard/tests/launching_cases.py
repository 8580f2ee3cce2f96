"""Tests that launch kernels, for `test_compile_launches.py`, which runs them with the plug-in."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tools.kernel_guard.tests.small_kernels import product


@triton.jit
def doubled(x, out, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at, mask=at < n, other=0.0) * 2, mask=at < n)


@triton.jit
def halves(x, out, WHOLE: tl.constexpr):
    """What comes after a return is compiled too, for which 16 bits are too few."""
    value = tl.load(x)
    if WHOLE:
        tl.store(out, value)
        return
    tl.store(out, value.to(tl.int32, bitcast=True))


def test_one_kernel_many_ways():
    for dtype in (torch.float32, torch.float16):
        memory = torch.ones(64, dtype=dtype)
        for x in (memory, memory[1:], memory):
            for n in (1, 16, 7, 9):
                out = torch.zeros(32, dtype=dtype)
                doubled[(1,)](x, out, n, BLOCK=32, num_warps=1)
                assert out.sum() == 2 * n


def test_a_kernel_that_no_gpu_compiles():
    x, out = torch.ones(1, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.bfloat16)
    halves[(1,)](x, out, WHOLE=True)
    assert out == 1


def test_a_kernel_that_fits_no_gpu():
    """Operands of 256 KiB, which have to be in shared memory."""
    x = torch.ones(64 * 1024, dtype=torch.float16)
    out = torch.zeros(64, 64)
    product[(1,)](x, x, out, N=64, M=1024, num_warps=16)
    assert (out == 1024).all()
