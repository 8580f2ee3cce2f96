"""The definition of apply's directions in numpy's int64, as plain as possible; see
`psyche_fast.integers`, of which nothing is used."""

from __future__ import annotations

from fractions import Fraction
from functools import cache

import numpy as np


@cache
def basis(n):
    j, b = np.arange(n)[:, None], np.arange(n)[None, :]
    turns = (2 * j + 1) * b % (4 * n)  # of 4n, exactly
    exact = np.cos(np.pi * turns / (2 * n)) * np.where(b == 0, np.sqrt(0.5), 1.0)
    return np.rint(2.0**18 * exact).astype(np.int64)


def nearest(a, divisor):
    """`a / divisor` to the nearest integer, ties to even."""
    low, rest = a // divisor, 2 * (a % divisor)
    return low + ((rest > divisor) | ((rest == divisor) & (low % 2 == 1)))


def float32(a):
    """Integers as float32 rounds them, still int64."""
    return a.astype(np.float32).astype(np.int64)


def product(a, d):
    ah, dh = nearest(a, 512), nearest(d, 512)
    al, dl = a - 512 * ah, d - 512 * dh
    return float32(512 * (ah @ dh) + ah @ dl + al @ dh)


def means(indices, values, totalk):
    """`C` of one chunk, `[totalk]`, from its entries; values bool or floating point."""
    sums, counts = [0] * totalk, [0] * totalk
    if values.dtype == bool:
        integers, numerator, denominator = np.where(values, -1, 1), 2**18, 1
    else:
        largest = np.abs(values).max(initial=0).astype(np.float32)
        exponent = int(largest.view(np.int32)) >> 23
        integers = [int(Fraction(float(v)) * Fraction(2) ** (156 - exponent)) for v in values]
        numerator, denominator = 1, 2**12
    for i, v in zip(indices, integers, strict=True):
        sums[i] += int(v)
        counts[i] += 1
    c = np.zeros(totalk, dtype=np.int64)
    for i, (s, n) in enumerate(zip(sums, counts, strict=True)):
        if n:
            whole = (2 * abs(s) * numerator + n * denominator) // (2 * n * denominator)
            c[i] = whole if s > 0 else -whole
    return c


def direction(c, h, w):
    """int64 `[h, w]` of -1, 0 and 1 for the coefficients of a chunk."""
    if h == 1 or w == 1:
        return np.sign(product(c.reshape(1, -1), basis(h * w).T)).reshape(h, w)
    z = product(basis(h), c.reshape(h, w))
    for row in z:
        t = 17 - (max(1, int(np.abs(row).max())).bit_length() - 1)
        row[:] = row << t if t >= 0 else nearest(row, 1 << -t)
    return np.sign(product(z, basis(w).T))


def directions(indices, values, h, w):
    """int64 `[chunks, h, w]` of entries `[chunks, m]` as numpy arrays."""
    chunks = [direction(means(i, v, h * w), h, w) for i, v in zip(indices, values, strict=True)]
    return np.stack(chunks) if chunks else np.zeros((0, h, w), dtype=np.int64)
