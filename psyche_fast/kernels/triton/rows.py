"""The operations for chunks with one dimension: vectors, and chunks of height or width 1.

A tile is `R` consecutive chunks of `L` elements, padded to `[R, W]`: one product with the basis
transforms them all. Chunks of a tile may belong to different parameters, so that each has an
address of its own. `STRIDED` says that a chunk runs down a column (width 1): its elements then lie
a row stride apart.
"""

from __future__ import annotations

import triton
import triton.language as tl

from psyche_fast.kernels.triton.arithmetic import (
    MAGNITUDE,
    exact_product,
    largest_exponent,
    load_limbs,
    mean_limbs,
    power_of_two,
    reciprocal,
    sign_times,
    tally,
    times_right,
)


@triton.jit
def locate_rows(
    members, table, chunk, live, j,
    DTYPE: tl.constexpr, STRIDED: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Addresses `[R, W]` of the chunks' elements, their members `[R]`, and which exist."""
    member = tl.load(table + 2 * chunk.to(tl.int64), mask=live, other=0).to(tl.int32)
    offset = tl.load(table + 2 * chunk.to(tl.int64) + 1, mask=live, other=0)
    address = tl.load(members + 2 * member, mask=live, other=0)
    present = live & (address != 0)
    at = (address.to(tl.pointer_type(DTYPE)) + offset)[:, None]
    if STRIDED:
        stride = tl.load(members + 2 * member + 1, mask=live, other=0)
        at = at + j * stride[:, None]
    else:
        if ALIGNED:
            at = tl.multiple_of(at, (16, 16))
        at = at + j
    return at, member, present


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


@triton.jit(do_not_specialize=["chunks", "rate_step"])
def encode_rows(
    members, table, delta, split_basis, previous_indices, previous_values, indices, values, scratch,
    rates, scale, anchors, anchor_table, decay, share, chunks, rate_step,
    K: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, R: tl.constexpr, L: tl.constexpr,
    W: tl.constexpr, GRADIENT: tl.constexpr, STRIDED: tl.constexpr, ALIGNED: tl.constexpr,
    ANCHOR: tl.constexpr = False, SHARE: tl.constexpr = False,
):  # fmt: skip
    """As `encode_tiles`, with `split_basis` the bfloat16 parts of `F` and then of `F^T`.

    Scratch is float32 `[programs, R * W]`, zero before and after.
    """
    dense = scratch + tl.program_id(0).to(tl.int64) * (R * W)
    j = tl.arange(0, W)[None, :]
    factor = tl.load(scale)
    finite = (factor.to(tl.int32, bitcast=True) & MAGNITUDE) < 0x7F800000
    for first in range(tl.program_id(0) * R, chunks, tl.num_programs(0) * R):
        chunk = first + tl.arange(0, R)
        live = chunk < chunks
        inside = live[:, None] & (j < L)
        state = delta + chunk.to(tl.int64)[:, None] * L + j
        d = tl.load(state, mask=inside, other=0.0).to(tl.float32)
        g_at, member, present = locate_rows(
            members, table, chunk, live, j, GRADIENT, STRIDED, ALIGNED
        )
        present &= finite
        g = tl.load(g_at, mask=present[:, None] & (j < L), other=0.0).to(tl.float32)
        if ANCHOR:
            a_at, _, _ = locate_rows(
                anchors, anchor_table, chunk, live, j, tl.float32, STRIDED, ALIGNED
            )
            g = tl.load(a_at, mask=present[:, None] & (j < L), other=0.0) - g
        rate = tl.load(rates + member * rate_step) * factor
        rate = tl.where(present, rate, 0.0)
        if M > 0:
            at = chunk.to(tl.int64) * M
            if M == L:  # everything has been sent, and lies in order
                x = tl.load(previous_values + at[:, None] + j, mask=inside, other=0.0)
                x = x.to(tl.float32)
            else:
                e = tl.arange(0, MP)[None, :]
                sent = live[:, None] & (e < M)
                index = tl.load(previous_indices + at[:, None] + e, mask=sent, other=0)
                value = tl.load(previous_values + at[:, None] + e, mask=sent, other=0.0)
                slot = dense + tl.arange(0, R)[:, None] * W + index.to(tl.int32)
                tl.store(slot, value.to(tl.float32), mask=sent)
                tl.debug_barrier()
                x = tl.load(dense + tl.arange(0, R)[:, None] * W + j)
                tl.debug_barrier()
                tl.store(slot, tl.zeros([R, MP], tl.float32), mask=sent)
                tl.debug_barrier()
            if SHARE:
                x *= share
            d -= times_right(x, split_basis + 2 * W * W, False, W)
        d = tl.fma(d, decay, g * rate[:, None])
        rounded = d.to(delta.dtype.element_ty)
        tl.store(state, rounded, mask=inside)
        if delta.dtype.element_ty == tl.bfloat16:
            c = times_right(rounded, split_basis, True, W)
        else:
            c = times_right(d, split_basis, False, W)
        if K == L:
            to = chunk.to(tl.int64)[:, None] * K + j
            shown = tl.broadcast_to(j, c.shape).to(indices.dtype.element_ty)
            tl.store(indices + to, shown, mask=inside)
            tl.store(values + to, c.to(values.dtype.element_ty), mask=inside)
        else:
            largest_by_threshold(c, j, j < L, chunk.to(tl.int64) * K, live, indices, values, K)


@triton.jit
def load_row_entries(
    indices,
    values,
    chunk,
    live,
    m,
    first,
    shift,
    MB: tl.constexpr,
    SIGNS: tl.constexpr,
    W: tl.constexpr,
):
    """Entries `first .. first + MB` of every chunk, `[R, MB]`: place, fixed point, validity."""
    e = first + tl.arange(0, MB)[None, :]
    there = live[:, None] & (e < m)
    at = chunk.to(tl.int64)[:, None] * m + e
    row = tl.arange(0, chunk.shape[0])[:, None]
    place = row * W + tl.load(indices + at, mask=there, other=0).to(tl.int32)
    value = tl.load(values + at, mask=there, other=0)
    if SIGNS:
        fixed = 1073741824.0 - 2147483648.0 * value.to(tl.float32)
    else:
        half = shift >> 1
        fixed = value.to(tl.float32) * power_of_two(half)[:, None]
        fixed = fixed * power_of_two(shift - half)[:, None]
    return place, fixed, there


@triton.jit
def mean_row_coefficients(
    indices,
    values,
    chunk,
    live,
    m,
    scratch,
    MB: tl.constexpr,
    SIGNS: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
    NAMED: tl.constexpr = True,
    divisor=1,
):
    """As `mean_coefficients`, of `R` chunks at once; scratch is int32 `[2, R * W]`.

    Returns:
        float32 `[R, W]`, and `shift`, int32 `[R]`.
    """
    counts = scratch
    sums = scratch + R * W
    all_places = tl.arange(0, R)[:, None] * W + tl.arange(0, W)[None, :]
    shift = tl.full([R], 30, tl.int32)
    if not SIGNS:
        many = tl.zeros([R, MB], tl.int32)
        for first in range(0, m, MB):
            e = first + tl.arange(0, MB)[None, :]
            there = live[:, None] & (e < m)
            v = tl.load(values + chunk.to(tl.int64)[:, None] * m + e, mask=there, other=0)
            many = tl.maximum(many, v.to(tl.float32).to(tl.int32, bitcast=True) & MAGNITUDE)
        shift = 156 - (tl.max(many, 1) >> 23)
    if NAMED:
        for first in range(0, m, MB):
            place, fixed, there = load_row_entries(
                indices, values, chunk, live, m, first, shift, MB, SIGNS, W
            )
            tl.atomic_add(counts + place, 1, mask=there, sem="relaxed", scope="cta")
        tl.debug_barrier()
    for first in range(0, m, MB):
        place, fixed, there = load_row_entries(
            indices, values, chunk, live, m, first, shift, MB, SIGNS, W
        )
        if NAMED:
            count = tl.load(counts + place, mask=there, other=1, cache_modifier=".cg")
        else:
            count = divisor
        share = (fixed * reciprocal(count)).to(tl.int32)
        tl.atomic_add(sums + place, share, mask=there, sem="relaxed", scope="cta")
    tl.debug_barrier()
    x = tl.load(sums + all_places, cache_modifier=".cg").to(tl.float32)
    tl.debug_barrier()
    tl.store(counts + all_places, tl.zeros([R, W], tl.int32))
    tl.store(sums + all_places, tl.zeros([R, W], tl.int32))
    tl.debug_barrier()
    return x, shift


@triton.jit
def exact_row_means(
    indices,
    values,
    chunk,
    live,
    m,
    words,
    MB: tl.constexpr,
    SIGNS: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
):
    """As `exact_means`, of `R` chunks with one dimension, `[R, W]`; words are `[R * W]`."""
    at = chunk.to(tl.int64)[:, None] * m
    entries = tl.broadcast_to(tl.arange(0, MB)[None, :], (R, MB))
    half = 1.0
    rest = 1.0
    if not SIGNS:
        shift = 156 - largest_exponent(values, at, m, live[:, None], entries, MB)
        half = power_of_two(shift >> 1)[:, None]
        rest = power_of_two(shift - (shift >> 1))[:, None]
    row = tl.arange(0, R)[:, None] * W
    for first in range(0, m, MB):
        e = first + entries
        there = live[:, None] & (e < m)
        place = row + tl.load(indices + at + e, mask=there, other=0).to(tl.int32)
        value = tl.load(values + at + e, mask=there, other=0)
        amount = tally(value, half, rest, SIGNS, words.dtype.element_ty)
        tl.atomic_add(words + place, amount, mask=there, sem="relaxed", scope="cta")
    tl.debug_barrier()
    all_places = row + tl.arange(0, W)[None, :]
    word = tl.load(words + all_places, cache_modifier=".cg")
    tl.debug_barrier()
    tl.store(words + all_places, tl.zeros([R, W], words.dtype.element_ty))
    tl.debug_barrier()
    return mean_limbs(word, SIGNS)


@triton.jit(do_not_specialize=["chunks", "m", "rate_step", "shrink_step"])
def apply_rows(
    members,
    table,
    ahead_members,
    ahead_table,
    delta,
    basis,
    indices,
    values,
    words,
    rates,
    shrinks,
    chunks,
    m,
    rate_step,
    shrink_step,
    MB: tl.constexpr,
    SIGNS: tl.constexpr,
    AHEAD: tl.constexpr,
    R: tl.constexpr,
    L: tl.constexpr,
    W: tl.constexpr,
    PARAMETER: tl.constexpr,
    COPY: tl.constexpr,
    STRIDED: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """As `apply_tiles`, with `basis` the limbs of `B^T` and words `[programs, R * W]`."""
    pid = tl.program_id(0)
    j = tl.arange(0, W)[None, :]
    own = words + pid.to(tl.int64) * (R * W)
    for first in range(pid * R, chunks, tl.num_programs(0) * R):
        chunk = first + tl.arange(0, R)
        live = chunk < chunks
        inside = live[:, None] & (j < L)
        c_high, c_low = exact_row_means(indices, values, chunk, live, m, own, MB, SIGNS, R, W)
        right_high, right_low = load_limbs(basis, W)
        x = exact_product(c_high, c_low, right_high, right_low)
        p_at, member, _ = locate_rows(members, table, chunk, live, j, PARAMETER, STRIDED, ALIGNED)
        rate = tl.load(rates + member * rate_step)[:, None]
        shrink = tl.load(shrinks + member * shrink_step)[:, None]
        p = tl.load(p_at, mask=inside, other=0.0).to(tl.float32) * shrink
        p = (p + sign_times(x, -rate)).to(PARAMETER)
        if AHEAD:
            d = tl.load(delta + chunk.to(tl.int64)[:, None] * L + j, mask=inside, other=0.0)
            ahead = (p.to(tl.float32) + sign_times(d.to(tl.float32), -rate)).to(COPY)
            a_at, _, _ = locate_rows(
                ahead_members, ahead_table, chunk, live, j, COPY, STRIDED, ALIGNED
            )
            tl.store(a_at, ahead, mask=inside)
        tl.store(p_at, p, mask=inside)


@triton.jit(do_not_specialize=["chunks", "rate_step"])
def lookahead_rows(
    members,
    table,
    ahead_members,
    ahead_table,
    delta,
    rates,
    chunks,
    rate_step,
    R: tl.constexpr,
    L: tl.constexpr,
    W: tl.constexpr,
    PARAMETER: tl.constexpr,
    COPY: tl.constexpr,
    STRIDED: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """As `lookahead_tiles`."""
    j = tl.arange(0, W)[None, :]
    for first in range(tl.program_id(0) * R, chunks, tl.num_programs(0) * R):
        chunk = first + tl.arange(0, R)
        live = chunk < chunks
        inside = live[:, None] & (j < L)
        p_at, member, _ = locate_rows(members, table, chunk, live, j, PARAMETER, STRIDED, ALIGNED)
        a_at, _, _ = locate_rows(ahead_members, ahead_table, chunk, live, j, COPY, STRIDED, ALIGNED)
        p = tl.load(p_at, mask=inside, other=0.0).to(tl.float32)
        d = tl.load(delta + chunk.to(tl.int64)[:, None] * L + j, mask=inside, other=0.0)
        rate = tl.load(rates + member * rate_step)[:, None]
        p += sign_times(d.to(tl.float32), -rate)
        tl.store(a_at, p.to(COPY), mask=inside)


@triton.jit(do_not_specialize=["chunks", "m"])
def subtract_rows(
    delta,
    split_basis,
    indices,
    values,
    scratch,
    chunks,
    m,
    MB: tl.constexpr,
    SIGNS: tl.constexpr,
    R: tl.constexpr,
    L: tl.constexpr,
    W: tl.constexpr,
):
    """As `subtract_tiles`, with `split_basis` as of `encode_rows`."""
    pid = tl.program_id(0)
    j = tl.arange(0, W)[None, :]
    own = scratch + pid.to(tl.int64) * (2 * R * W)
    for first in range(pid * R, chunks, tl.num_programs(0) * R):
        chunk = first + tl.arange(0, R)
        live = chunk < chunks
        inside = live[:, None] & (j < L)
        x, shift = mean_row_coefficients(indices, values, chunk, live, m, own, MB, SIGNS, R, W)
        x = times_right(x, split_basis + 2 * W * W, False, W)
        half = shift >> 1
        x = x * power_of_two(-half)[:, None] * power_of_two(half - shift)[:, None]
        at = delta + chunk.to(tl.int64)[:, None] * L + j
        d = tl.load(at, mask=inside, other=0.0).to(tl.float32) - x
        tl.store(at, d.to(delta.dtype.element_ty), mask=inside)
