"""The direction of an update, decided in integers: the definition that all replicas share.

It is a function of the bytes received. Replicas have to agree on every sign, so that `sign(decode(
mean))` is not left to floating point, which adds up otherwise on every processor.

For chunks of `h x w` (RNE: nearest, ties to even; `hi(a) = RNE(a / 512)`, `lo(a) = a - 512 hi(a)`):

1. `B_n[j, b] = RNE(2^18 g_b cos(pi (2j + 1) b / 2n))`, `g_0 = sqrt(1/2)`, else 1.
2. Per coefficient: `N` entries name it, `S` is the sum of their integers: signs are +-1; values `v`
   are `trunc(v 2^(156 - e))`, `e` the exponent field of the chunk's largest magnitude as float32.
3. `C = S 2^18 / N` of signs, `S / (2^12 N)` of values, to the nearest integer, halves away from
   zero; 0 where nobody names it.
4. `P(A, D) = f32(512 hi(A) hi(D) + hi(A) lo(D) + lo(A) hi(D))`, sums exact, rounded once (RNE).
5. `Z' = P(B_h, C)`; each row in 18 bits: `t = 17 - floor(log2(max(1, max |Z'|)))`,
   `Z = RNE(Z' 2^t)`.
6. The direction is `sgn(P(Z, B_w^T))`; of chunks with `h = 1` or `w = 1` it is `sgn(P(C, B^T))`.

A GPU comes to these sums by fp16 products: `|hi| <= 512`, `|lo| <= 256` and 64 terms keep every
partial sum an integer of at most 2^24, which float32 accumulators hold in any order and rounding.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from functools import cache

import torch
from torch import Tensor

BITS = 18
LIMB = 512
MOST_ENTRIES = (1 << 16) - 1
"""Entries of one chunk: their count has 16 bits."""

_VERSION = "exact apply 1"  # new with any change of the definition


@cache
def integer_basis(n: int) -> Tensor:
    """`B_n`, float64 `[n, n]` of integers up to 2^18, on the CPU; not to be written to."""
    rows = [[_entry((2 * j + 1) * b, n, b) for b in range(n)] for j in range(n)]
    return torch.tensor(rows, dtype=torch.float64)


def _entry(m: int, n: int, b: int) -> int:
    """`2^18 g_b cos(pi m / 2n)`; equal magnitudes are equal and zeros are zero for any libm."""
    return round((1 << BITS) * (math.sqrt(0.5) if b == 0 else 1.0) * cosine(m, n))


def cosine(m: int, n: int) -> float:
    """`cos(pi m / 2n)` for a whole number m, the angle brought into the first quadrant."""
    m %= 4 * n
    if m > 2 * n:
        m = 4 * n - m
    if m == n:
        return 0.0
    if m > n:
        return -math.cos(math.pi * (2 * n - m) / (2 * n))
    return math.cos(math.pi * m / (2 * n))


def limbs(a: Tensor) -> tuple[Tensor, Tensor]:
    """`hi` and `lo` of integers in a floating-point dtype."""
    high = (a / LIMB).round_()
    return high, a.sub(high, alpha=LIMB)


def definition_hash(sides: Iterable[int] = range(1, 65)) -> int:
    """64 bits that differ where replicas would decide signs by another definition.

    Args:
        sides: of the chunks, whose tables are part of it.
    """
    hashed = hashlib.blake2b(_VERSION.encode(), digest_size=8)
    for n in sorted(set(sides)):
        hashed.update(integer_basis(n).to(torch.int32).numpy().tobytes())
    return int.from_bytes(hashed.digest(), "little")
