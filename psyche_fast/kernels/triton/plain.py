"""Encode of chunks without transform: from gradients, or from anchors and parameters, in one pass.

A tile is `R` consecutive chunks of `L` elements, padded to `[R, N]`. A chunk is a block of a matrix
or a run of a vector: element `e` lies `e // w` rows below its first one and `e % w` columns beside.
"""

from __future__ import annotations

import triton
import triton.language as tl

from psyche_fast.kernels.triton.arithmetic import MAGNITUDE
from psyche_fast.kernels.triton.rows import largest_by_threshold


@triton.jit
def locate_plain(
    members, table, chunk, live, e, L: tl.constexpr, w: tl.constexpr, DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """Addresses `[R, N]` of the chunks' elements, their members `[R]`, and which exist."""
    member = tl.load(table + 2 * chunk.to(tl.int64), mask=live, other=0).to(tl.int32)
    offset = tl.load(table + 2 * chunk.to(tl.int64) + 1, mask=live, other=0)
    address = tl.load(members + 2 * member, mask=live, other=0)
    present = live & (address != 0)
    at = (address.to(tl.pointer_type(DTYPE)) + offset)[:, None]
    if ALIGNED:
        at = tl.multiple_of(at, (16, 16))
    if w == L:
        at = at + e
    else:
        stride = tl.load(members + 2 * member + 1, mask=live, other=0)[:, None]
        if ALIGNED:
            stride = tl.multiple_of(stride, (8, 8))
        at = at + (e // w) * stride + e % w
    return at, member, present


@triton.jit
def take_up(
    members, table, anchors, anchor_table, delta, rates, scale, decay, chunk, live, e, rate_step,
    L: tl.constexpr, w: tl.constexpr, GRADIENT: tl.constexpr, ANCHOR: tl.constexpr,
    KEPT: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """`decay * delta + rate * scale * source`, float32 `[R, N]`, 0 beyond the chunks."""
    factor = tl.load(scale)
    finite = (factor.to(tl.int32, bitcast=True) & MAGNITUDE) < 0x7F800000
    g_at, member, present = locate_plain(members, table, chunk, live, e, L, w, GRADIENT, ALIGNED)
    present &= finite
    there = present[:, None] & (e < L)
    d = tl.load(g_at, mask=there, other=0.0).to(tl.float32)
    if ANCHOR:
        a_at, _, _ = locate_plain(anchors, anchor_table, chunk, live, e, L, w, tl.float32, ALIGNED)
        d = tl.load(a_at, mask=there, other=0.0) - d
    rate = tl.load(rates + member * rate_step, mask=live, other=0.0) * factor
    d *= tl.where(present, rate, 0.0)[:, None]
    if KEPT:
        state = delta + chunk.to(tl.int64)[:, None] * L + e
        old = tl.load(state, mask=live[:, None] & (e < L), other=0.0)
        d = tl.fma(old, decay, d)
    return d


@triton.jit(do_not_specialize=["chunks", "rate_step"])
def encode_plain(
    members, table, delta, previous_indices, previous_values, indices, values, rates, scale,
    anchors, anchor_table, decay, share, chunks, rate_step,
    K: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, R: tl.constexpr, L: tl.constexpr,
    N: tl.constexpr, w: tl.constexpr, GRADIENT: tl.constexpr, ANCHOR: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """As `encode_tiles`, of chunks as they are.

    Args:
        anchors: like `members`, of what the source is subtracted from (ANCHOR).
        anchor_table: like `table`.
        delta: float32 `[chunks, L]`.
        share: of the previous entries that is taken out.
        K: entries that are selected; 0 for none, the state alone is brought up to date.
    """
    e = tl.arange(0, N)[None, :]
    for first in range(tl.program_id(0) * R, chunks, tl.num_programs(0) * R):
        chunk = first + tl.arange(0, R)
        live = chunk < chunks
        start = chunk.to(tl.int64)[:, None]
        if M > 0:
            m = tl.arange(0, MP)[None, :]
            sent = live[:, None] & (m < M)
            index = tl.load(previous_indices + start * M + m, mask=sent, other=0).to(tl.int32)
            value = tl.load(previous_values + start * M + m, mask=sent, other=0.0).to(tl.float32)
            slot = delta + start * L + index
            old = tl.load(slot, mask=sent, other=0.0)
            tl.store(slot, old - share * value, mask=sent)
            tl.debug_barrier()
        d = take_up(
            members, table, anchors, anchor_table, delta, rates, scale, decay, chunk, live, e,
            rate_step, L, w, GRADIENT, ANCHOR, True, ALIGNED,
        )  # fmt: skip
        tl.store(delta + start * L + e, d, mask=live[:, None] & (e < L))
        if K == L:
            inside = live[:, None] & (e < L)
            shown = tl.broadcast_to(e, d.shape).to(indices.dtype.element_ty)
            tl.store(indices + start * K + e, shown, mask=inside)
            tl.store(values + start * K + e, d.to(values.dtype.element_ty), mask=inside)
        elif K > 0:
            largest_by_threshold(d, e, e < L, chunk.to(tl.int64) * K, live, indices, values, K)
