"""What the kernels share: signs, split products, transforms, means of entries, selection.

Peers must come to the same bits on any GPU, so nothing here depends on how a compiler fuses: every
fused multiply-add is written out, and kernels are launched with `enable_fp_fusion=False`.
"""

from __future__ import annotations

import triton
import triton.language as tl

MAGNITUDE = tl.constexpr(0x7FFFFFFF)
"""Mask of a float32's magnitude. As bits, magnitudes are ordered like their values, and NaN above
infinity."""


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


@triton.jit
def load_entries(
    indices,
    values,
    at,
    m,
    first,
    shift,
    E: tl.constexpr,
    SIGNS: tl.constexpr,
    w: tl.constexpr,
    W: tl.constexpr,
):
    """Entries `first .. first + E` of a tile: place in the padded tile, fixed point, validity."""
    e = first + tl.arange(0, E)
    there = e < m
    place = tl.load(indices + at + e, mask=there, other=0).to(tl.int32)
    if w != W:
        row = place // w
        place = row * W + (place - row * w)
    value = tl.load(values + at + e, mask=there, other=0)
    if SIGNS:
        fixed = 1073741824.0 - 2147483648.0 * value.to(tl.float32)
    else:
        # In two steps: the factor for subnormal numbers is no float32.
        half = shift >> 1
        fixed = value.to(tl.float32) * power_of_two(half) * power_of_two(shift - half)
    return place, fixed, there


@triton.jit
def mean_coefficients(
    indices,
    values,
    at,
    m,
    scratch,
    E: tl.constexpr,
    ONE_PASS: tl.constexpr,
    SIGNS: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    w: tl.constexpr,
):
    """Dense coefficients of one tile, each the mean over the entries that name it.

    Entries are counted and then added up as integers, in scratch memory that only this program
    uses: the result is the same in whatever order they come. Integers are the mean times
    `2^shift`.

    Args:
        indices: `[tiles, m]`.
        values: `[tiles, m]`, floating point, or bool of signs (SIGNS).
        at: int64, the tile's first entry.
        m: entries per tile.
        scratch: int32 `[2, H * W]`, zero before and after.

    Returns:
        float32 `[H, W]`, and `shift`, int32.
    """
    counts = scratch
    sums = scratch + H * W
    all_places = tl.arange(0, H)[:, None] * W + tl.arange(0, W)[None, :]
    shift = 30
    if not SIGNS:
        if ONE_PASS:
            e = tl.arange(0, E)
            v = tl.load(values + at + e, mask=e < m, other=0).to(tl.float32)
            most = tl.max(v.to(tl.int32, bitcast=True) & MAGNITUDE, 0)
        else:
            many = tl.zeros([E], tl.int32)
            for first in range(0, m, E):
                e = first + tl.arange(0, E)
                v = tl.load(values + at + e, mask=e < m, other=0).to(tl.float32)
                many = tl.maximum(many, v.to(tl.int32, bitcast=True) & MAGNITUDE)
            most = tl.max(many, 0)
        # The largest magnitude comes to lie below 2^30.
        shift = 156 - (most >> 23)
    if ONE_PASS:
        place, fixed, there = load_entries(indices, values, at, m, 0, shift, E, SIGNS, w, W)
        tl.atomic_add(counts + place, 1, mask=there, sem="relaxed", scope="cta")
        tl.debug_barrier()
        # Atomics take place in the L2 cache, so nothing may be read from the L1.
        count = tl.load(counts + place, mask=there, other=1, cache_modifier=".cg")
        tl.debug_barrier()
        tl.store(counts + place, tl.zeros([E], tl.int32), mask=there)
        share = (fixed * reciprocal(count)).to(tl.int32)
        tl.atomic_add(sums + place, share, mask=there, sem="relaxed", scope="cta")
        tl.debug_barrier()
        x = tl.load(sums + all_places, cache_modifier=".cg").to(tl.float32)
        tl.debug_barrier()
        tl.store(sums + place, tl.zeros([E], tl.int32), mask=there)
    else:
        for first in range(0, m, E):
            place, fixed, there = load_entries(indices, values, at, m, first, shift, E, SIGNS, w, W)
            tl.atomic_add(counts + place, 1, mask=there, sem="relaxed", scope="cta")
        tl.debug_barrier()
        for first in range(0, m, E):
            place, fixed, there = load_entries(indices, values, at, m, first, shift, E, SIGNS, w, W)
            count = tl.load(counts + place, mask=there, other=1, cache_modifier=".cg")
            share = (fixed * reciprocal(count)).to(tl.int32)
            tl.atomic_add(sums + place, share, mask=there, sem="relaxed", scope="cta")
        tl.debug_barrier()
        x = tl.load(sums + all_places, cache_modifier=".cg").to(tl.float32)
        tl.debug_barrier()
        tl.store(counts + all_places, tl.zeros([H, W], tl.int32))
        tl.store(sums + all_places, tl.zeros([H, W], tl.int32))
        tl.debug_barrier()
    return x, shift


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
    coefficients, maxima, at, live, indices, values,
    K: tl.constexpr, KP: tl.constexpr, T: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
    w: tl.constexpr, HINT: tl.constexpr,
):  # fmt: skip
    """Select from `T` tiles at once, one round per entry.

    Each round reads the row with the largest maximum again, for the entry in it and the
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
        # After a tie within the row, the columns up to the last entry are done.
        done = tl.where((last == most) & (last_row == row), last_column, -1)
        # The column and the sign in one reduction.
        packed = tl.min(
            tl.where(equal & (columns > done[:, None]), (columns << 1) | ((x >> 31) & 1), 2 * W), 1
        )
        column = packed >> 1
        rest = (key < most[:, None]) | (equal & (columns > column[:, None]))
        following = tl.max(tl.where(rest, key, -1), 1)
        maxima = tl.where(row_numbers == row[:, None], following[:, None], maxima)
        last, last_row, last_column = most, row, column
        current = slot == j
        index = tl.where(current, (row * w + column)[:, None], index)
        bits = tl.where(current, (most | (packed << 31))[:, None], bits)
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
    chosen = above | (equal & (tl.cumsum(equal.to(tl.int32), 1) <= wanted[:, None]))
    to = at[:, None] + tl.cumsum(chosen.to(tl.int32), 1) - 1
    chosen &= live[:, None]
    shown = tl.broadcast_to(index, c.shape).to(indices.dtype.element_ty)
    tl.store(indices + to, shown, mask=chosen)
    tl.store(values + to, c.to(values.dtype.element_ty), mask=chosen)
