"""The kernels' arithmetic by itself, each function in a kernel of its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from psyche_fast.kernels.triton import arithmetic as a
from psyche_fast.kernels.triton.launch import _split
from tests import oracles
from tests.kernels.support import TINY, f64

# Functions that kernels call have to be globals known to Triton.
power_of_two, reciprocal, sandwich = a.power_of_two, a.reciprocal, a.sandwich
sign_times, split, times_right = a.sign_times, a.split, a.times_right
BLOCK = 1024
EXACT_TERMS = 2.0**-15
"""Error of a product of split operands relative to the sum of its terms' magnitudes: the low parts'
product is left out, and they are rounded to 8 bits themselves. A low part is within 2^-7 (cut) or
2^-8 (rounded) of the operand."""


@triton.jit
def reciprocals(n, out, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, reciprocal(tl.load(n + at, mask=at < count, other=1)), mask=at < count)


@triton.jit
def powers(exponents, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, power_of_two(tl.load(exponents + at)))


@triton.jit
def signs(x, a, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, sign_times(tl.load(x + at), tl.load(a + at)))


@triton.jit
def splits(x, high, low, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    top, rest = split(tl.load(x + at))
    tl.store(high + at, top)
    tl.store(low + at, rest)


@triton.jit
def sandwiches(x, table, out, EXACT: tl.constexpr, H: tl.constexpr, W: tl.constexpr):
    at = tl.arange(0, H)[:, None] * W + tl.arange(0, W)[None, :]
    tl.store(out + at, sandwich(tl.load(x + at), table, EXACT, H, W))


@triton.jit
def products(x, table, out, EXACT: tl.constexpr, W: tl.constexpr):
    at = tl.arange(0, 16)[:, None] * W + tl.arange(0, W)[None, :]
    tl.store(out + at, times_right(tl.load(x + at), table, EXACT, W))


def run(kernel, *arguments, grid=1, **constants):
    kernel[(grid,)](*arguments, **constants, enable_fp_fusion=False)


def test_reciprocal(device, backend):
    """Every number of entries that there may be, and 0, which counts as 1."""
    n = torch.arange(2**17 + 1, dtype=torch.int32, device=device)
    out = torch.zeros(n.numel(), device=device)
    grid = triton.cdiv(n.numel(), 1 << 14)
    run(reciprocals, n, out, n.numel(), grid=grid, BLOCK=1 << 14)
    exact = 1 / np.maximum(n.cpu().numpy(), 1).astype(np.float64)
    assert (np.abs(f64(out) - exact) <= exact * 2.0**-22).all()


def test_power_of_two(device, backend):
    exponents = torch.arange(-126, 130, dtype=torch.int32).clamp(max=127).to(device)
    out = torch.zeros(256, device=device)
    run(powers, exponents, out, BLOCK=256)
    assert (f64(out) == 2.0 ** exponents.cpu().numpy().astype(np.float64)).all()


def test_sign_times(device, backend):
    """Infinities and subnormal numbers have signs, zeros of either sign have none."""
    x = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-38, -1.5, 3e38, -torch.inf, torch.inf])
    a = torch.tensor([0.1, -0.1, 1e-40, 0.0, -3.0])
    left, right = x.repeat_interleave(len(a)), a.repeat(len(x))
    padding = BLOCK - left.numel()
    left, right = (torch.nn.functional.pad(t, (0, padding)).to(device) for t in (left, right))
    out = torch.zeros(BLOCK, device=device)
    run(signs, left, right, out, BLOCK=BLOCK)
    assert torch.equal(out.cpu(), (right * left.sign()).cpu())


@pytest.mark.parametrize("magnitude", [1e-30, 1.0, 1e30])
def test_split(magnitude, device, backend):
    generator = torch.Generator().manual_seed(0)
    x = (magnitude * torch.randn(BLOCK, generator=generator)).to(device)
    high, low = (torch.zeros(BLOCK, dtype=torch.bfloat16, device=device) for _ in range(2))
    run(splits, x, high, low, BLOCK=BLOCK)
    assert (f64(high).astype(np.float32).view(np.int32) & 0xFFFF == 0).all()
    assert (np.abs(f64(x) - f64(high)) < np.abs(f64(x)) * 2.0**-7).all()
    assert (np.abs(f64(x) - f64(high) - f64(low)) <= np.abs(f64(x)) * 2.0**-16).all()


@pytest.mark.parametrize("n", [1, 3, 16, 50, 64])
def test_split_basis(n, device):
    side = 64
    basis = oracles.dct_basis(n)
    table = f64(_split(torch.from_numpy(basis).float().to(device), side))
    whole = table.reshape(2, side, side).sum(0)
    assert (np.abs(whole[:n, :n] - basis) <= 2.0**-17 * np.abs(basis)).all()
    assert np.count_nonzero(whole) <= n * n


def inputs(kind, h, w):
    """Constants add all errors up; numbers of which much is cut off make them large."""
    generator = torch.Generator().manual_seed(1)
    if kind == "random":
        return torch.randn(h, w, generator=generator)
    if kind == "subnormal":
        return 1e-39 * torch.randn(h, w, generator=generator)
    return torch.full((h, w), {"constant": 1.0, "rounded low": 1.0076, "cut": 1.9921}[kind])


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("kind", ["random", "constant", "rounded low", "cut", "subnormal"])
@pytest.mark.parametrize(("h", "w"), [(64, 64), (16, 64), (32, 16)])
def test_sandwich(h, w, kind, exact, device, backend):
    left, right = oracles.dct_basis(h).T, oracles.dct_basis(w)
    parts = [_split(torch.from_numpy(m.copy()).float(), n) for m, n in ((left, h), (right, w))]
    x = inputs(kind, h, w).to(device, torch.bfloat16 if exact else torch.float32)
    out = torch.zeros(h, w, device=device)
    run(sandwiches, x, torch.cat(parts).to(device), out, EXACT=exact, H=h, W=w)
    terms = np.abs(left) @ np.abs(f64(x)) @ np.abs(right)
    error = np.abs(f64(out) - left @ f64(x) @ right)
    assert (error <= 2 * EXACT_TERMS * terms + TINY).all()


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("kind", ["random", "constant", "rounded low", "cut", "subnormal"])
@pytest.mark.parametrize("w", [16, 64])
def test_times_right(w, kind, exact, device, backend):
    right = oracles.dct_basis(w)
    x = inputs(kind, 16, w).to(device, torch.bfloat16 if exact else torch.float32)
    out = torch.zeros(16, w, device=device)
    table = _split(torch.from_numpy(right).float(), w).to(device)
    run(products, x, table, out, EXACT=exact, W=w)
    error = np.abs(f64(out) - f64(x) @ right)
    assert (error <= EXACT_TERMS * (np.abs(f64(x)) @ np.abs(right)) + TINY).all()
