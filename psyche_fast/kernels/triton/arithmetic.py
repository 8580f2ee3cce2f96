"""Arithmetic that the kernels share: signs, split products, the transforms.

Peers must come to the same bits on any GPU, so nothing here depends on how a compiler fuses: every
fused multiply-add is written out, and kernels are launched with `enable_fp_fusion=False`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sign_times(x, a):
    """`a * sign(x)` for float32, with sign(0) = 0. Three bit operations instead of two compares."""
    signed = a.to(tl.int32, bitcast=True) ^ (x.to(tl.int32, bitcast=True) & (-2147483648))
    return tl.where(x == 0, 0.0, signed.to(tl.float32, bitcast=True))


@triton.jit
def split(x):
    """`x ~ high + low` in bfloat16, 16 bits together.

    The high part is truncated, which is one logical operation; rounding it would unpack and pack.
    """
    high = (x.to(tl.int32, bitcast=True) & (-65536)).to(tl.float32, bitcast=True)
    return high.to(tl.bfloat16), (x - high).to(tl.bfloat16)


@triton.jit
def product(a_high, a_low, b_high, b_low):
    """`a @ b` of split operands, small terms first; error about 2^-16 of the terms."""
    c = tl.dot(a_low, b_high)
    c = tl.dot(a_high, b_low, c)
    return tl.dot(a_high, b_high, c)


@triton.jit
def add_product(c, a_high, a_low, b_high, b_low):
    """`c + a @ b` of split operands."""
    c = tl.dot(a_low, b_high, c)
    c = tl.dot(a_high, b_low, c)
    return tl.dot(a_high, b_high, c)


@triton.jit
def load_split(table, N: tl.constexpr):
    """High and low part of an `[N, N]` matrix of a basis table `[2, N, N]`."""
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    return tl.load(table + at), tl.load(table + N * N + at)


@triton.jit
def sandwich(x, table, EXACT: tl.constexpr, H: tl.constexpr, W: tl.constexpr):
    """`left @ x @ right`; the table holds left `[2, H, H]` and then right `[2, W, W]`.

    With `EXACT`, `x` is a bfloat16 tensor and needs no splitting.
    """
    right_high, right_low = load_split(table + 2 * H * H, W)
    if EXACT:
        y = tl.dot(x, right_low)
        y = tl.dot(x, right_high, y)
    else:
        x_high, x_low = split(x)
        y = product(x_high, x_low, right_high, right_low)
    left_high, left_low = load_split(table, H)
    y_high, y_low = split(y)
    return product(left_high, left_low, y_high, y_low)


@triton.jit
def times_right(x, table, EXACT: tl.constexpr, W: tl.constexpr):
    """`x @ right` with `right` `[2, W, W]` in the table: the transform of chunks that are rows.

    With `EXACT`, `x` is a bfloat16 tensor and needs no splitting.
    """
    right_high, right_low = load_split(table, W)
    if EXACT:
        y = tl.dot(x, right_low)
        y = tl.dot(x, right_high, y)
    else:
        x_high, x_low = split(x)
        y = product(x_high, x_low, right_high, right_low)
    return y


@triton.jit
def reciprocal(n):
    """`1 / n` of positive int32 in float32, within 2^-22, by IEEE operations alone.

    The division instruction of GPUs is not correctly rounded, and may differ between generations.
    """
    x = tl.maximum(n, 1).to(tl.float32)
    r = (0x7EF311C3 - x.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    r = r * tl.fma(-x, r, 2.0)
    r = r * tl.fma(-x, r, 2.0)
    return r * tl.fma(-x, r, 2.0)


@triton.jit
def power_of_two(exponent):
    """`2^exponent` for int32 within -126 .. 127, exact."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)
