"""Encode of a chunk class, and its kernel for chunks of matrices: all in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from psyche_fast.kernels.plan import ChunkPlan, Entries, Rates
from psyche_fast.kernels.triton.apply import subtract
from psyche_fast.kernels.triton.arithmetic import (
    MAGNITUDE,
    add_product,
    sandwich,
    split,
)
from psyche_fast.kernels.triton.launch import (
    MOST_ROUNDS,
    encode_constants,
    launch_options,
    on_device,
    padded,
    planned,
    programs,
    rates,
    uniform,
    written,
)
from psyche_fast.kernels.triton.plain import encode_plain
from psyche_fast.kernels.triton.rows import encode_rows, largest_by_threshold

SIDE, LEAST_SIDE = 64, 16
"""Of vectors' chunks as tiles; and sides from which tiles are worth a program's while."""


@triton.jit
def decode_own(
    previous_indices, previous_values, rows_h, rows_w, at, share,
    M: tl.constexpr, MP: tl.constexpr, MC: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
    w: tl.constexpr, SHARE: tl.constexpr,
):  # fmt: skip
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
        if SHARE:
            value *= share
        row = index // w
        column = index - row * w
        left_high, left_low = split(tl.load(rows_h + row[None, :] * H + i) * value[None, :])
        right_high, right_low = split(tl.load(rows_w + column[:, None] * W + j))
        x = add_product(x, left_high, left_low, right_high, right_low)
    return x


@triton.jit
def take_out(
    delta, indices, values, tile, share, M: tl.constexpr, MP: tl.constexpr, LENGTH: tl.constexpr
):
    """`delta -= share * values` where the distinct indices of one tile of `LENGTH` say."""
    e = tl.arange(0, MP)
    there = e < M
    index = tl.load(indices + tile * M + e, mask=there, other=0).to(tl.int32)
    value = tl.load(values + tile * M + e, mask=there, other=0.0).to(tl.float32)
    slot = delta + tile * LENGTH + index
    old = tl.load(slot, mask=there, other=0.0).to(tl.float32)
    tl.store(slot, (old - share * value).to(delta.dtype.element_ty), mask=there)
    tl.debug_barrier()


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


@triton.jit(do_not_specialize=["tiles", "rate_step"])
def encode_tiles(
    members, table, delta, split_basis, rows_h, rows_w, zeros, previous_indices, previous_values,
    indices, values, scratch, rates, scale, anchors, anchor_table, decay, share, tiles, rate_step,
    K: tl.constexpr, KP: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, MC: tl.constexpr,
    T: tl.constexpr, h: tl.constexpr, w: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
    GRADIENT: tl.constexpr, ALIGNED: tl.constexpr, ROUNDS: tl.constexpr,
    SELECT_ROWS: tl.constexpr, STREAM: tl.constexpr, KEEP: tl.constexpr,
    ANCHOR: tl.constexpr = False, SHARE: tl.constexpr = False, TRANSFORM: tl.constexpr = True,
    FLAT: tl.constexpr = False,
):  # fmt: skip
    """One program handles groups of `T` tiles; a tile is one chunk `h x w` padded to `H x W`.

    Args:
        members: int64 `[members, 2]`: address of the gradient (0: none) and its row stride.
        table: int64 `[tiles, 2]`: member, and offset of the tile in it in elements.
        delta: state `[tiles, h, w]`.
        split_basis: bfloat16, `F_h^T` and `F_w` as `sandwich` wants them.
        rows_h: float32 `[H, H]`, `F_h^T`.
        rows_w: float32 `[W, W]`, `F_w^T`.
        zeros: what is read instead of a missing gradient.
        previous_indices: `[tiles, M]`, distinct in each tile.
        previous_values: `[tiles, M]`.
        indices: `[tiles, K]`, written.
        values: `[tiles, K]`, written.
        scratch: float32, `T * (H * W + H)` per program.
        rates: float32, learning rate of member i at `i * rate_step`.
        scale: float32, one factor on all gradients; gradients are left out if it is not finite.
        anchors: like `members`, of what the gradient is subtracted from, float32 (ANCHOR).
        anchor_table: like `table`.
        decay: factor on the state.
        share: of the previous entries that is taken out (SHARE).
        tiles: number of tiles.
        rate_step: see `rates`.
        K: entries that are selected of each tile; `KP` is the power of two above.
        M: entries that are decoded of each tile, `MC` at once; `MP` is the multiple of it above.
        T: tiles that are selected from together.
        GRADIENT: dtype of the gradients.
        ALIGNED: their rows begin at multiples of 16 bytes.
        ROUNDS: select entry by entry, else by bisection.
        SELECT_ROWS: keep rows out of scratch memory that cannot hold a selected entry.
        STREAM: eviction policy of what is read and written once.
        KEEP: eviction policy of the coefficients.
        TRANSFORM: else elements are selected from as they are, and bases are not read.
        FLAT: tiles are runs of vectors, their rows side by side.
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
            if FLAT:
                stride = tl.cast(w, tl.int64)
            rate = tl.load(rates + member * rate_step) * factor
            present = finite & (address != 0)
            rate = tl.where(present, rate, 0.0)
            address = tl.where(present, address, zeros.to(tl.int64))
            stride = tl.where(present, stride, 0)
            offset = tl.where(present, offset, 0)
            g_at = address.to(tl.pointer_type(GRADIENT))
            stride = stride.to(tl.int32)
            if ALIGNED:
                g_at = tl.multiple_of(g_at, 16)
                stride = tl.multiple_of(stride, 8)
                offset = tl.multiple_of(offset, 8)
            g_at = g_at + offset + i * stride + j
            if M > 0 and not TRANSFORM:
                take_out(
                    delta, previous_indices, previous_values, tl.cast(tile, tl.int64), share,
                    M, MP, h * w,
                )  # fmt: skip
            if WHOLE:
                d = tl.load(state, eviction_policy=STREAM).to(tl.float32)
            else:
                d = tl.load(state, mask=inside, other=0.0).to(tl.float32)
            if M > 0 and TRANSFORM:
                d -= decode_own(
                    previous_indices, previous_values, rows_h, rows_w, tl.cast(tile, tl.int64) * M,
                    share, M, MP, MC, H, W, w, SHARE,
                )  # fmt: skip
            # Not earlier: registers are short while the decode runs.
            if WHOLE:
                g = tl.load(g_at, eviction_policy=STREAM).to(tl.float32)
            else:
                g = tl.load(g_at, mask=inside, other=0.0).to(tl.float32)
            if ANCHOR:
                a_member = tl.load(anchor_table + 2 * tile).to(tl.int32)
                a_at = tl.load(anchors + 2 * a_member).to(tl.pointer_type(tl.float32))
                a_at += tl.load(anchor_table + 2 * tile + 1)
                a_stride = tl.load(anchors + 2 * a_member + 1).to(tl.int32)
                if FLAT:
                    a_stride = w
                if ALIGNED:
                    a_at = tl.multiple_of(a_at, 16)
                    a_stride = tl.multiple_of(a_stride, 8)
                a_at = a_at + i * a_stride + j
                g = tl.load(a_at, mask=inside & present, other=0.0) - g
            d = tl.fma(d, decay, g * rate)
            rounded = d.to(delta.dtype.element_ty)
            if WHOLE:
                tl.store(state, rounded, eviction_policy=STREAM)
            else:
                tl.store(state, rounded, mask=inside)
            # What is sent is read from the state as it has been rounded.
            if not TRANSFORM:
                c = d
            elif delta.dtype.element_ty == tl.bfloat16:
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
                position = tl.arange(0, H * W)[None, :]
                row = position // W
                column = position - row * W
                largest_by_threshold(
                    tl.reshape(c, [1, H * W]), row * w + column, (row < h) & (column < w),
                    tl.cast(tile, tl.int64) * K + tl.zeros([1], tl.int64),
                    tl.full([1], True, tl.int1), indices, values, K,
                )  # fmt: skip
        if ROUNDS:
            tl.debug_barrier()
            t_all = tl.arange(0, T)
            of_rows = tl.load(maxima + t_all[:, None] * H + tl.arange(0, H)[None, :])
            largest_in_rounds(
                coefficients, of_rows, (group + t_all).to(tl.int64) * K, (group + t_all) < tiles,
                indices, values, K, KP, T, H, W, w, KEEP,
            )  # fmt: skip
            tl.debug_barrier()


def encode(
    plan: ChunkPlan,
    delta: Tensor,
    gradients: Sequence[Tensor | None],
    learning_rates: Rates,
    decay: float,
    gradient_scale: float | Tensor | None,
    previous: Entries | None,
    share: float,
    anchors: Sequence[Tensor] | None,
) -> Entries:
    """See `psyche_fast.kernels.encode.encode`."""
    return _encode(
        plan, delta, gradients, learning_rates, decay, gradient_scale, previous, share, anchors,
        plan.k,
    )  # fmt: skip


def update(
    plan: ChunkPlan,
    delta: Tensor,
    gradients: Sequence[Tensor | None],
    learning_rates: Rates,
    decay: float,
    gradient_scale: float | Tensor | None,
    previous: Entries | None,
    share: float,
    anchors: Sequence[Tensor] | None,
) -> None:
    """See `psyche_fast.kernels.encode.update`."""
    _encode(
        plan, delta, gradients, learning_rates, decay, gradient_scale, previous, share, anchors, 0
    )


def _encode(
    plan: ChunkPlan,
    delta: Tensor,
    gradients: Sequence[Tensor | None],
    learning_rates: Rates,
    decay: float,
    gradient_scale: float | Tensor | None,
    previous: Entries | None,
    share: float,
    anchors: Sequence[Tensor] | None,
    k: int,
) -> Entries:
    device = plan.device
    indices = torch.empty(plan.chunks, k, dtype=plan.index_dtype, device=device)
    values = torch.empty(plan.chunks, k, dtype=plan.dtype, device=device)
    entries = Entries(indices, values, unique=True)
    if plan.chunks == 0:
        return entries
    if previous is not None and not plan.is_transformed:
        assert previous.unique
        previous = Entries(previous.indices.contiguous(), previous.values.contiguous(), True)
    elif previous is not None and not _decodable(previous):
        previous = Entries(previous.indices, previous.values * share, previous.unique)
        subtract(plan, delta, previous)
        previous = None
    ready = planned(plan)
    gradients = uniform(gradients)  # by name: copies have to live until the launch
    sources = ready.members(gradients, "gradient")
    fixed = sources if anchors is None else ready.members(anchors, "anchor")
    aligned = sources.aligned and fixed.aligned
    rate, rate_step = rates(learning_rates, device)
    scale = gradient_scale
    if not isinstance(scale, Tensor):
        scale, _ = rates([1.0 if scale is None else scale], device)
    sent, m = (entries, 0) if previous is None else (previous, previous.indices.shape[1])
    h, w, is_flat = plan.h, plan.w, False
    if plan.is_transformed:
        kernel = "rows" if ready.is_rows else "encode"
    else:
        assert delta.dtype == torch.float32
        if h == 1 and w % SIDE == 0:
            h, w, is_flat = w // SIDE, SIDE, True
        kernel = "encode" if 0 < k <= MOST_ROUNDS and min(h, w) >= LEAST_SIDE else "plain"
    options, own = launch_options(kernel, device)
    together = own["tiles"] if kernel == "encode" else ready.rows_per_tile
    grid = (programs(device, own["ctas_per_sm"], triton.cdiv(plan.chunks, together)),)
    run: Any
    bases: tuple[Tensor, ...] = ()
    size = 0
    if kernel == "plain":
        run = encode_plain
        constants = {
            "K": k, "M": m, "MP": triton.next_power_of_2(max(m, 1)), "R": together,
            "L": ready.length, "N": padded(ready.length), "w": plan.w,
        }  # fmt: skip
    elif kernel == "rows":
        run, size, bases = encode_rows, ready.W, (ready.forward_basis,)
        constants = {
            "K": k, "M": m, "MP": triton.next_power_of_2(max(m, 1)), "R": together,
            "L": ready.length, "W": ready.W, "STRIDED": ready.strided, "SHARE": share != 1.0,
        }  # fmt: skip
    else:
        H, W = padded(h), padded(w)
        run, size = encode_tiles, H * W + H
        if plan.is_transformed:
            bases = (ready.forward_basis, ready.rows_h, ready.rows_w, ready.zeros)
        else:
            bases = (ready.zeros,) * 4  # only the last one is read
        constants = {
            **encode_constants(k, m), "T": together, "h": h, "w": w, "H": H, "W": W,
            "SELECT_ROWS": own["select_rows"], "STREAM": own["stream"], "KEEP": own["keep"],
            "SHARE": share != 1.0, "TRANSFORM": plan.is_transformed, "FLAT": is_flat,
        }  # fmt: skip
    scratch = [ready.scratch(torch.float32, grid[0] * together * size, device)] if size else []
    with on_device(device):
        run[grid](
            sources.addresses, sources.table, delta, *bases, sent.indices, sent.values, indices,
            values, *scratch, rate, scale, fixed.addresses, fixed.table, decay, share, plan.chunks,
            rate_step, GRADIENT=sources.dtype, ALIGNED=aligned, ANCHOR=anchors is not None,
            **constants, **options,
        )  # fmt: skip
    written(delta)
    return entries


def _decodable(entries: Entries) -> bool:
    """Whether encode can decode own entries by itself: distinct ones, and in order if all."""
    return entries.unique and entries.indices.is_contiguous() and entries.values.is_contiguous()
