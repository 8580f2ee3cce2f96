"""Apply of a chunk class of matrices: peers' entries to their mean, decode, update, in one pass."""

from __future__ import annotations

import triton
import triton.language as tl

from psyche_fast.kernels.triton.arithmetic import (
    power_of_two,
    reciprocal,
    sandwich,
    sign_times,
)
from psyche_fast.kernels.triton.selection import MAGNITUDE


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
def locate(members, table, tile, i, j, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Addresses `[H, W]` of a tile of a parameter, and its member."""
    member = tl.load(table + 2 * tile).to(tl.int32)
    offset = tl.load(table + 2 * tile + 1)
    at = tl.load(members + 2 * member).to(tl.pointer_type(DTYPE))
    stride = tl.load(members + 2 * member + 1).to(tl.int32)
    if ALIGNED:
        at = tl.multiple_of(at, 16)
        stride = tl.multiple_of(stride, 8)
        offset = tl.multiple_of(offset, 8)
    return at + offset + i * stride + j, member


@triton.jit(do_not_specialize=["tiles", "m", "rate_step", "shrink_step"])
def apply_tiles(
    members,
    table,
    ahead_members,
    ahead_table,
    delta,
    split_basis,
    indices,
    values,
    scratch,
    rates,
    shrinks,
    tiles,
    m,
    rate_step,
    shrink_step,
    E: tl.constexpr,
    ONE_PASS: tl.constexpr,
    SIGNS: tl.constexpr,
    AHEAD: tl.constexpr,
    SHRINK: tl.constexpr,
    h: tl.constexpr,
    w: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    PARAMETER: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """`p = shrink * p - rate * sign(x)`, and the look-ahead `p - rate * sign(delta)`.

    Args:
        members: int64 `[members, 2]`: address of the parameter and its row stride.
        table: int64 `[tiles, 2]`: member, and offset of the tile in it in elements.
        ahead_members: like `members`, of the look-ahead (AHEAD "copy").
        ahead_table: like `table`, of the look-ahead.
        delta: state `[tiles, h, w]`.
        split_basis: bfloat16, `F_h` and `F_w^T` as `sandwich` wants them.
        indices: `[tiles, m]`.
        values: `[tiles, m]`.
        scratch: int32 `[programs, 2, H * W]`, zero before and after.
        rates: float32, learning rate of member i at `i * rate_step`.
        shrinks: float32, factor on member i at `i * shrink_step` (SHRINK).
        tiles: how many there are.
        m: entries per tile.
        AHEAD: "no", "copy" (to `ahead_members`) or "in place" (the parameter becomes it).
    """
    pid = tl.program_id(0)
    i = tl.arange(0, H)[:, None]
    j = tl.arange(0, W)[None, :]
    WHOLE: tl.constexpr = (h == H) and (w == W)
    inside = (i < h) & (j < w)
    own = scratch + pid.to(tl.int64) * (2 * H * W)
    for tile in range(pid, tiles, tl.num_programs(0)):
        p_at, member = locate(members, table, tile, i, j, PARAMETER, ALIGNED)
        d_at = delta + tl.cast(tile, tl.int64) * (h * w) + i * w + j
        # Early, to be on their way while entries are counted; where registers are too few for
        # both, delta comes later.
        EARLY: tl.constexpr = tl.float32 != PARAMETER
        if WHOLE:
            p = tl.load(p_at)
            if EARLY and AHEAD != "no":
                d = tl.load(d_at)
        else:
            p = tl.load(p_at, mask=inside, other=0.0)
            if EARLY and AHEAD != "no":
                d = tl.load(d_at, mask=inside, other=0.0)
        x, _ = mean_coefficients(
            indices, values, tl.cast(tile, tl.int64) * m, m, own, E, ONE_PASS, SIGNS, H, W, w
        )
        x = sandwich(x, split_basis, False, H, W)  # only its sign counts, not its scale
        if not EARLY and AHEAD != "no":
            d = tl.load(d_at, mask=inside, other=0.0)
        rate = tl.load(rates + member * rate_step)
        step = sign_times(x, -rate)
        if SHRINK:
            p = tl.fma(p.to(tl.float32), tl.load(shrinks + member * shrink_step), step)
        else:
            p = p.to(tl.float32) + step
        p = p.to(PARAMETER)
        if AHEAD != "no":
            ahead = (p.to(tl.float32) + sign_times(d.to(tl.float32), -rate)).to(PARAMETER)
            if AHEAD == "copy":
                a_at, _ = locate(ahead_members, ahead_table, tile, i, j, PARAMETER, ALIGNED)
                if WHOLE:
                    tl.store(a_at, ahead)
                else:
                    tl.store(a_at, ahead, mask=inside)
            else:
                p = ahead
        if WHOLE:
            tl.store(p_at, p)
        else:
            tl.store(p_at, p, mask=inside)


@triton.jit(do_not_specialize=["tiles", "rate_step"])
def lookahead_tiles(
    members,
    table,
    ahead_members,
    ahead_table,
    delta,
    rates,
    tiles,
    rate_step,
    h: tl.constexpr,
    w: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    PARAMETER: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """`ahead = p - rate * sign(delta)`; arguments as of `apply_tiles`."""
    i = tl.arange(0, H)[:, None]
    j = tl.arange(0, W)[None, :]
    inside = (i < h) & (j < w)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        p_at, member = locate(members, table, tile, i, j, PARAMETER, ALIGNED)
        a_at, _ = locate(ahead_members, ahead_table, tile, i, j, PARAMETER, ALIGNED)
        d_at = delta + tl.cast(tile, tl.int64) * (h * w) + i * w + j
        p = tl.load(p_at, mask=inside, other=0.0).to(tl.float32)
        d = tl.load(d_at, mask=inside, other=0.0).to(tl.float32)
        p += sign_times(d, -tl.load(rates + member * rate_step))
        tl.store(a_at, p.to(PARAMETER), mask=inside)


@triton.jit(do_not_specialize=["tiles", "m"])
def subtract_tiles(
    delta,
    split_basis,
    indices,
    values,
    scratch,
    tiles,
    m,
    E: tl.constexpr,
    ONE_PASS: tl.constexpr,
    SIGNS: tl.constexpr,
    h: tl.constexpr,
    w: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
):
    """`delta -= decode(entries)`; arguments as of `apply_tiles`."""
    pid = tl.program_id(0)
    i = tl.arange(0, H)[:, None]
    j = tl.arange(0, W)[None, :]
    inside = (i < h) & (j < w)
    own = scratch + pid.to(tl.int64) * (2 * H * W)
    for tile in range(pid, tiles, tl.num_programs(0)):
        d_at = delta + tl.cast(tile, tl.int64) * (h * w) + i * w + j
        d = tl.load(d_at, mask=inside, other=0.0).to(tl.float32)
        x, shift = mean_coefficients(
            indices, values, tl.cast(tile, tl.int64) * m, m, own, E, ONE_PASS, SIGNS, H, W, w
        )
        x = sandwich(x, split_basis, False, H, W)
        half = shift >> 1
        d -= x * power_of_two(-half) * power_of_two(half - shift)
        tl.store(d_at, d.to(delta.dtype.element_ty), mask=inside)
