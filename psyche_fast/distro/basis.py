"""The orthonormal DCT-II basis."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=256)
def dct_basis(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`F[j, b] = s_b cos(pi (2j + 1) b / 2n)` with `s_0 = sqrt(1/n)`, otherwise `sqrt(2/n)`.

    Computed in float64 with the angle brought into the first quadrant by integer arithmetic, so
    that entries that vanish are exactly zero and entries of equal magnitude are equal: patterns
    that cancel then cancel exactly.

    Args:
        n: side of the chunk, at least 1.
        dtype: floating-point dtype of the result.
        device: where the result lives.

    Returns:
        `[n, n]`, shared between callers: not to be written to.
    """
    rows = [[_scale(n, b) * _cosine((2 * j + 1) * b, n) for b in range(n)] for j in range(n)]
    return torch.tensor(rows, dtype=torch.float64).to(device=device, dtype=dtype)


def _scale(n: int, b: int) -> float:
    return math.sqrt((1 if b == 0 else 2) / n)


def _cosine(m: int, n: int) -> float:
    """`cos(pi m / 2n)` for a whole number m."""
    m %= 4 * n
    if m > 2 * n:
        m = 4 * n - m
    if m == n:
        return 0.0
    if m > n:
        return -math.cos(math.pi * (2 * n - m) / (2 * n))
    return math.cos(math.pi * m / (2 * n))
