"""Encode of a chunk class of matrices: state update, transform and selection in one pass."""

from __future__ import annotations

import triton
import triton.language as tl

from psyche_fast.kernels.triton.arithmetic import add_product, sandwich, sign_times, split
from psyche_fast.kernels.triton.selection import (
    MAGNITUDE,
    largest_by_threshold,
    largest_in_rounds,
)


@triton.jit
def decode_own(
    previous_indices,
    previous_values,
    rows_h,
    rows_w,
    at,
    M: tl.constexpr,
    MP: tl.constexpr,
    MC: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    w: tl.constexpr,
):
    """`F_h C F_w^T` for `M` entries with distinct indices, as a sum of outer products `[H, W]`.

    Rows of the transposed bases are gathered; nothing is scattered.
    """
    i = tl.arange(0, H)[:, None]
    j = tl.arange(0, W)[None, :]
    x = tl.zeros([H, W], tl.float32)
    for first in tl.range(0, MP, MC, loop_unroll_factor=1):
        e = first + tl.arange(0, MC)
        index = tl.load(previous_indices + at + e, mask=e < M, other=0).to(tl.int32)
        value = tl.load(previous_values + at + e, mask=e < M, other=0.0).to(tl.float32)
        row = index // w
        column = index - row * w
        left_high, left_low = split(tl.load(rows_h + row[None, :] * H + i) * value[None, :])
        right_high, right_low = split(tl.load(rows_w + column[:, None] * W + j))
        x = add_product(x, left_high, left_low, right_high, right_low)
    return x


@triton.jit(do_not_specialize=["tiles", "rate_step", "previous_rate_step", "shrink_step"])
def encode_tiles(
    members,
    table,
    delta,
    split_basis,
    rows_h,
    rows_w,
    zeros,
    previous_indices,
    previous_values,
    indices,
    values,
    scratch,
    rates,
    scale,
    parameter_members,
    parameter_table,
    previous_rates,
    shrinks,
    decay,
    tiles,
    rate_step,
    previous_rate_step,
    shrink_step,
    K: tl.constexpr,
    KP: tl.constexpr,
    M: tl.constexpr,
    MP: tl.constexpr,
    MC: tl.constexpr,
    T: tl.constexpr,
    h: tl.constexpr,
    w: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    GRADIENT: tl.constexpr,
    PARAMETER: tl.constexpr,
    IN_PLACE: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROUNDS: tl.constexpr,
    SELECT_ROWS: tl.constexpr,
    STREAM: tl.constexpr,
    KEEP: tl.constexpr,
):
    """One program handles groups of `T` tiles; a tile is one chunk `h x w` padded to `H x W`.

    Args:
        members: int64 `[members, 2]`: address of the gradient (0: none) and its row stride.
        table: int64 `[tiles, 2]`: member, and offset of the tile in it in elements.
        delta: state `[tiles, h, w]`.
        split_basis: bfloat16, `F_h^T` and `F_w` as `sandwich` wants them.
        rows_h: float32 `[H, H]`, `F_h^T`.
        rows_w: float32 `[W, W]`, `F_w^T`.
        zeros: what is read instead of a gradient that is not there.
        previous_indices: `[tiles, M]`, distinct in each tile.
        previous_values: `[tiles, M]`.
        indices: `[tiles, K]`, written.
        values: `[tiles, K]`, written.
        scratch: float32, `T * (H * W + H)` per program.
        rates: float32, learning rate of member i at `i * rate_step`.
        scale: float32, one factor on all gradients; gradients are left out if it is not finite.
        parameter_members: like `members`, for parameters in the look-ahead (IN_PLACE).
        parameter_table: like `table`, for parameters.
        previous_rates: float32, of the look-ahead.
        shrinks: float32, factors on the parameters.
        decay: factor on the state.
        tiles: how many there are.
    """
    pid = tl.program_id(0)
    i = tl.arange(0, H)[:, None]
    j = tl.arange(0, W)[None, :]
    WHOLE: tl.constexpr = (h == H) and (w == W)
    inside = (i < h) & (j < w)
    factor = tl.load(scale)
    finite = (factor.to(tl.int32, bitcast=True) & MAGNITUDE) < 0x7F800000
    coefficients = scratch + pid.to(tl.int64) * (T * (H * W + H))
    maxima = (coefficients + T * H * W).to(tl.pointer_type(tl.int32))
    for group in range(pid * T, tiles, tl.num_programs(0) * T):
        for t in tl.range(0, tl.minimum(T, tiles - group), num_stages=1):
            tile = group + t
            state = delta + tl.cast(tile, tl.int64) * (h * w) + i * w + j
            member = tl.load(table + 2 * tile).to(tl.int32)
            offset = tl.load(table + 2 * tile + 1)
            address = tl.load(members + 2 * member)
            stride = tl.load(members + 2 * member + 1)
            rate = tl.load(rates + member * rate_step) * factor
            there = finite & (address != 0)
            rate = tl.where(there, rate, 0.0)
            address = tl.where(there, address, zeros.to(tl.int64))
            stride = tl.where(there, stride, 0)
            offset = tl.where(there, offset, 0)
            g_at = address.to(tl.pointer_type(GRADIENT))
            stride = stride.to(tl.int32)
            if ALIGNED:
                g_at = tl.multiple_of(g_at, 16)
                stride = tl.multiple_of(stride, 8)
                offset = tl.multiple_of(offset, 8)
            g_at = g_at + offset + i * stride + j
            if WHOLE:
                d = tl.load(state, eviction_policy=STREAM).to(tl.float32)
            else:
                d = tl.load(state, mask=inside, other=0.0).to(tl.float32)
            if IN_PLACE:
                p_member = tl.load(parameter_table + 2 * tile).to(tl.int32)
                p_offset = tl.load(parameter_table + 2 * tile + 1)
                p_address = tl.load(parameter_members + 2 * p_member)
                p_stride = tl.load(parameter_members + 2 * p_member + 1).to(tl.int32)
                p_at = p_address.to(tl.pointer_type(PARAMETER))
                if ALIGNED:
                    p_at = tl.multiple_of(p_at, 16)
                    p_stride = tl.multiple_of(p_stride, 8)
                    p_offset = tl.multiple_of(p_offset, 8)
                p_at = p_at + p_offset + i * p_stride + j
                back = tl.load(previous_rates + p_member * previous_rate_step)
                shrink = tl.load(shrinks + p_member * shrink_step)
                if WHOLE:
                    p = tl.load(p_at, eviction_policy=STREAM).to(tl.float32)
                    p = (p + sign_times(d, back)) * shrink
                    tl.store(p_at, p.to(PARAMETER), eviction_policy=STREAM)
                else:
                    p = tl.load(p_at, mask=inside, other=0.0).to(tl.float32)
                    p = (p + sign_times(d, back)) * shrink
                    tl.store(p_at, p.to(PARAMETER), mask=inside)
            if M > 0:
                d -= decode_own(
                    previous_indices,
                    previous_values,
                    rows_h,
                    rows_w,
                    tl.cast(tile, tl.int64) * M,
                    M,
                    MP,
                    MC,
                    H,
                    W,
                    w,
                )
            # Not earlier: registers are short while the decode runs.
            if WHOLE:
                g = tl.load(g_at, eviction_policy=STREAM).to(tl.float32)
            else:
                g = tl.load(g_at, mask=inside, other=0.0).to(tl.float32)
            d = tl.fma(d, decay, g * rate)
            rounded = d.to(delta.dtype.element_ty)
            if WHOLE:
                tl.store(state, rounded, eviction_policy=STREAM)
            else:
                tl.store(state, rounded, mask=inside)
            # What is sent is read from the state as it has been rounded.
            if delta.dtype.element_ty == tl.bfloat16:
                c = sandwich(rounded, split_basis, True, H, W)
            else:
                c = sandwich(d, split_basis, False, H, W)
            if ROUNDS:
                key = c.to(tl.int32, bitcast=True) & MAGNITUDE
                if not WHOLE:
                    key = tl.where(inside, key, -1)
                most = tl.max(key, 1)
                tl.store(maxima + t * H + tl.arange(0, H), most)
                to = coefficients + t * (H * W) + i * W + j
                if SELECT_ROWS:
                    # A row with K rows above it cannot hold one of the K largest.
                    above = tl.expand_dims(most, 0) > tl.expand_dims(most, 1)
                    needed = tl.sum(above.to(tl.int32), 1) < K
                    tl.store(to, c, mask=needed[:, None], eviction_policy=KEEP)
                else:
                    tl.store(to, c, eviction_policy=KEEP)
            else:
                place = tl.arange(0, H * W)[None, :]
                row = place // W
                column = place - row * W
                largest_by_threshold(
                    tl.reshape(c, [1, H * W]),
                    row * w + column,
                    (row < h) & (column < w),
                    tl.cast(tile, tl.int64) * K + tl.zeros([1], tl.int64),
                    tl.full([1], True, tl.int1),
                    indices,
                    values,
                    K,
                )
        if ROUNDS:
            tl.debug_barrier()
            t_all = tl.arange(0, T)
            of_rows = tl.load(maxima + t_all[:, None] * H + tl.arange(0, H)[None, :])
            largest_in_rounds(
                coefficients,
                of_rows,
                (group + t_all).to(tl.int64) * K,
                (group + t_all) < tiles,
                indices,
                values,
                K,
                KP,
                T,
                H,
                W,
                w,
                KEEP,
            )
            tl.debug_barrier()
