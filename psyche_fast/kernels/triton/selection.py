"""The k coefficients of largest magnitude, ties to the lowest index, in ascending order of index.

Magnitudes are compared as bits: for non-negative floats these are ordered like the values, and NaN
above infinity, as the reference has it.
"""

from __future__ import annotations

import triton
import triton.language as tl

MAGNITUDE = tl.constexpr(0x7FFFFFFF)


@triton.jit
def store_sorted(index, bits, at, live, indices, values, K: tl.constexpr, KP: tl.constexpr):
    """Store `[T, KP]` entries, of which the first `K` count, in ascending order of index."""
    slot = tl.arange(0, KP)[None, :]
    index = tl.where(slot < K, index, 0x7FFFFFFF)
    rank = tl.sum((index[:, None, :] < index[:, :, None]).to(tl.int32), 2)
    to = at[:, None] + rank
    keep = live[:, None] & (slot < K)
    tl.store(indices + to, index.to(indices.dtype.element_ty), mask=keep)
    value = bits.to(tl.float32, bitcast=True)
    tl.store(values + to, value.to(values.dtype.element_ty), mask=keep)


@triton.jit
def largest_in_rounds(
    coefficients,
    maxima,
    at,
    live,
    indices,
    values,
    K: tl.constexpr,
    KP: tl.constexpr,
    T: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    w: tl.constexpr,
    HINT: tl.constexpr,
):
    """Select from `T` tiles at once, one round per entry.

    Each round takes the row with the largest maximum, reads it again, and finds the entry and the
    row's next maximum. With one warp per tile (T = number of warps) a round has no barrier.

    Args:
        coefficients: `[T, H, W]` float32 in scratch memory.
        maxima: `[T, H]` int32, the largest magnitude bits of every row.
        at: `[T]` int64, where each tile's entries go.
        live: `[T]`, whether the tile exists.
    """
    row_numbers = tl.arange(0, H)[None, :]
    columns = tl.arange(0, W)[None, :]
    slot = tl.arange(0, KP)[None, :]
    rows = coefficients + tl.arange(0, T)[:, None] * (H * W) + columns
    last = tl.full([T], -1, tl.int32)  # magnitude of the last entry
    last_row = tl.full([T], -1, tl.int32)
    last_column = tl.full([T], -1, tl.int32)
    index = tl.zeros([T, KP], tl.int32)
    bits = tl.zeros([T, KP], tl.int32)
    for j in range(K):
        most = tl.max(maxima, 1)
        row = tl.min(tl.where(maxima == most[:, None], row_numbers, H), 1)
        if w == W:
            x = tl.load(rows + (row * W)[:, None], eviction_policy=HINT)
        else:
            x = tl.load(rows + (row * W)[:, None], mask=columns < w, other=0.0)
        x = x.to(tl.int32, bitcast=True)
        key = x & MAGNITUDE
        if w != W:
            key = tl.where(columns < w, key, -1)
        equal = key == most[:, None]
        # After a tie within the row, the columns up to the last entry have been taken.
        taken = tl.where((last == most) & (last_row == row), last_column, -1)
        # The column and the sign in one reduction.
        found = tl.min(
            tl.where(equal & (columns > taken[:, None]), (columns << 1) | ((x >> 31) & 1), 2 * W), 1
        )
        column = found >> 1
        rest = (key < most[:, None]) | (equal & (columns > column[:, None]))
        following = tl.max(tl.where(rest, key, -1), 1)
        maxima = tl.where(row_numbers == row[:, None], following[:, None], maxima)
        last, last_row, last_column = most, row, column
        here = slot == j
        index = tl.where(here, (row * w + column)[:, None], index)
        bits = tl.where(here, (most | (found << 31))[:, None], bits)
    store_sorted(index, bits, at, live, indices, values, K, KP)


@triton.jit
def largest_by_threshold(c, index, valid, at, live, indices, values, K: tl.constexpr):
    """Select from every row of `[R, N]` by bisecting the K-th magnitude.

    The cost is the same for any `K`.

    Args:
        c: float32 `[R, N]`, in ascending order of index.
        index: int32 `[1, N]`.
        valid: `[1, N]`, which columns are no padding; at least `K`.
        at: int64 `[R]`, where each row's entries go.
        live: `[R]`, whether the row exists.
    """
    x = c.to(tl.int32, bitcast=True)
    key = tl.where(valid, x & MAGNITUDE, -1)
    # The largest threshold that K keys reach, bit by bit from above: the K-th key itself.
    threshold = tl.zeros_like(live.to(tl.int32))
    for step in range(31):
        higher = threshold | (1 << (30 - step))
        # Minus one for every key that reaches it: a subtraction and a shift, without comparing.
        reached = -tl.sum((higher[:, None] - 1 - key) >> 31, 1)
        threshold = tl.where(reached >= K, higher, threshold)
    above = key > threshold[:, None]
    equal = key == threshold[:, None]
    wanted = K - tl.sum(above.to(tl.int32), 1)
    taken = above | (equal & (tl.cumsum(equal.to(tl.int32), 1) <= wanted[:, None]))
    to = at[:, None] + tl.cumsum(taken.to(tl.int32), 1) - 1
    taken &= live[:, None]
    shown = tl.broadcast_to(index, c.shape).to(indices.dtype.element_ty)
    tl.store(indices + to, shown, mask=taken)
    tl.store(values + to, c.to(values.dtype.element_ty), mask=taken)
