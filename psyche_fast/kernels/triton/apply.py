"""Apply, look-ahead and subtract of a chunk class, and their kernels for chunks of matrices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from psyche_fast.kernels.plan import ChunkPlan, Entries, Rates
from psyche_fast.kernels.triton.arithmetic import (
    exact_means,
    exact_product,
    exact_sandwich,
    load_limbs,
    mean_coefficients,
    power_of_two,
    sandwich,
    sign_times,
)
from psyche_fast.kernels.triton.launch import (
    ROW_ENTRIES,
    Planned,
    entries_at_once,
    launch_options,
    on_device,
    planned,
    programs,
    rates,
    written,
)
from psyche_fast.kernels.triton.rows import apply_rows, lookahead_rows, subtract_rows


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
    basis,
    indices,
    values,
    words,
    planes,
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
    COPY: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """`p = shrink * p - rate * direction`, and the look-ahead `p - rate * sign(delta)`.

    Product and sum are rounded one by one, as on a CPU; a step of 0 is one of +0.

    Args:
        members: int64 `[members, 2]`: address of the parameter and its row stride.
        table: int64 `[tiles, 2]`: member, and offset of the tile in it in elements.
        ahead_members: like `members`, of the look-ahead (AHEAD).
        ahead_table: like `table`, of the look-ahead.
        delta: state `[tiles, h, w]` (AHEAD).
        basis: fp16, limbs of `B_h` and `B_w^T` as `exact_sandwich` wants them.
        indices: `[tiles, m]`.
        values: `[tiles, m]`.
        words: `[programs, H * W]`, see `exact_means`.
        planes: fp16 `[programs, 2, H * W]`, see `exact_means`.
        rates: float32, learning rate of member i at `i * rate_step`.
        shrinks: float32, factor on member i at `i * shrink_step` (SHRINK).
        tiles: how many there are.
        m: entries per tile.
        AHEAD: whether there is a look-ahead to write.
        PARAMETER: dtype of the parameters.
        COPY: dtype of the look-ahead.
    """
    pid = tl.program_id(0)
    i = tl.arange(0, H)[:, None]
    j = tl.arange(0, W)[None, :]
    inside = (i < h) & (j < w)
    own_words = words + pid.to(tl.int64) * (H * W)
    own_planes = planes + pid.to(tl.int64) * (2 * H * W)
    for tile in range(pid, tiles, tl.num_programs(0)):
        p_at, member = locate(members, table, tile, i, j, PARAMETER, ALIGNED)
        d_at = delta + tl.cast(tile, tl.int64) * (h * w) + i * w + j
        # Early, to be on its way while entries are counted, where there are the registers for it.
        EARLY: tl.constexpr = tl.float32 != PARAMETER
        if EARLY:
            p = tl.load(p_at, mask=inside, other=0.0)
        c_high, c_low = exact_means(
            indices,
            values,
            tl.cast(tile, tl.int64) * m,
            m,
            own_words,
            own_planes,
            E,
            ONE_PASS,
            SIGNS,
            H,
            W,
            w,
        )
        x = exact_sandwich(c_high, c_low, basis, H, W)
        if not EARLY:
            p = tl.load(p_at, mask=inside, other=0.0)
        if AHEAD:
            d = tl.load(d_at, mask=inside, other=0.0)
        rate = tl.load(rates + member * rate_step)
        step = sign_times(x, -rate)
        p = p.to(tl.float32)
        if SHRINK:
            p *= tl.load(shrinks + member * shrink_step)
        p = (p + step).to(PARAMETER)
        if AHEAD:
            ahead = (p.to(tl.float32) + sign_times(d.to(tl.float32), -rate)).to(COPY)
            a_at, _ = locate(ahead_members, ahead_table, tile, i, j, COPY, ALIGNED)
            tl.store(a_at, ahead, mask=inside)
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
    COPY: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """`ahead = p - rate * sign(delta)`; arguments as of `apply_tiles`."""
    i = tl.arange(0, H)[:, None]
    j = tl.arange(0, W)[None, :]
    inside = (i < h) & (j < w)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        p_at, member = locate(members, table, tile, i, j, PARAMETER, ALIGNED)
        a_at, _ = locate(ahead_members, ahead_table, tile, i, j, COPY, ALIGNED)
        d_at = delta + tl.cast(tile, tl.int64) * (h * w) + i * w + j
        p = tl.load(p_at, mask=inside, other=0.0).to(tl.float32)
        d = tl.load(d_at, mask=inside, other=0.0).to(tl.float32)
        p += sign_times(d, -tl.load(rates + member * rate_step))
        tl.store(a_at, p.to(COPY), mask=inside)


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


@triton.jit
def product_of_limbs(a, b, out, N: tl.constexpr):
    """`P(A, B)` of limbs `[2, N, N]` into float32 `[N, N]`."""
    a_high, a_low = load_limbs(a, N)
    b_high, b_low = load_limbs(b, N)
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out + at, exact_product(a_high, a_low, b_high, b_low))


def exact_products(a: Tensor, b: Tensor) -> Tensor:
    """`P(A, B)` of limbs, float32 `[2, N, N]`, as `apply` comes to it."""
    out = torch.empty_like(a[0])
    with on_device(a.device):
        product_of_limbs[(1,)](
            a.half(), b.half(), out, N=a.shape[-1], num_warps=4, enable_fp_fusion=False
        )
    return out


def subtract(plan: ChunkPlan, delta: Tensor, entries: Entries) -> None:
    """See `psyche_fast.kernels.apply.subtract`."""
    m = entries.indices.shape[1]
    if plan.chunks == 0 or m == 0:
        return
    ready = planned(plan)
    grid, constants, options = _decoding(plan, ready, m)
    elements = (ready.rows_per_tile if ready.is_rows else ready.H) * ready.W
    scratch = ready.scratch(torch.int32, grid[0] * 2 * elements, plan.device)
    kernel = subtract_rows if ready.is_rows else subtract_tiles
    with on_device(plan.device):
        kernel[grid](
            delta,
            ready.inverse_basis,
            entries.indices.contiguous(),
            _values(entries),
            scratch,
            plan.chunks,
            m,
            SIGNS=entries.values.dtype == torch.bool,
            **constants,
            **options,
        )
    written(delta)


def apply(
    plan: ChunkPlan,
    parameters: Sequence[Tensor],
    entries: Entries,
    learning_rates: Rates,
    shrinks: Rates | None,
    ahead: Sequence[Tensor] | None,
    delta: Tensor | None,
) -> None:
    """See `psyche_fast.kernels.apply.apply`."""
    m = entries.indices.shape[1]
    if plan.chunks == 0:
        return
    ready = planned(plan)
    targets = ready.members(parameters, "parameter")
    copies = targets if ahead is None else ready.members(ahead, "look-ahead")
    rate, rate_step = rates(learning_rates, plan.device)
    shrink, shrink_step = rates(shrinks, plan.device)
    grid, constants, options = _decoding(plan, ready, m, is_exact=True)
    signs = entries.values.dtype == torch.bool
    elements = grid[0] * (ready.rows_per_tile if ready.is_rows else ready.H) * ready.W
    narrow = signs and m < 1 << 15
    words = ready.scratch(torch.int32 if narrow else torch.int64, elements, plan.device)
    if ready.is_rows:
        kernel = apply_rows
        constants["STRIDED"] = ready.strided
        scratch = (words,)
    else:
        kernel = apply_tiles
        constants["SHRINK"] = shrinks is not None
        # One pass wants zeros, the other way leaves whatever it was.
        planes = 2 * elements + 8 * (not constants["ONE_PASS"])
        scratch = (words, ready.scratch(torch.float16, planes, plan.device))
    with on_device(plan.device):
        kernel[grid](
            targets.addresses,
            targets.table,
            copies.addresses,
            copies.table,
            shrink if delta is None else delta,  # not read where there is no look-ahead
            ready.limbs,
            entries.indices.contiguous(),
            _values(entries),
            *scratch,
            rate,
            shrink,
            plan.chunks,
            m,
            rate_step,
            shrink_step,
            SIGNS=signs,
            AHEAD=ahead is not None,
            PARAMETER=targets.dtype,
            COPY=copies.dtype,
            ALIGNED=targets.aligned and copies.aligned,
            **constants,
            **options,
        )
    written(*parameters, *(ahead or ()))


def lookahead(
    plan: ChunkPlan,
    parameters: Sequence[Tensor],
    delta: Tensor,
    learning_rates: Rates,
    ahead: Sequence[Tensor],
) -> None:
    """See `psyche_fast.kernels.apply.lookahead`."""
    if plan.chunks == 0:
        return
    ready = planned(plan)
    targets = ready.members(parameters, "parameter")
    copies = ready.members(ahead, "look-ahead")
    rate, rate_step = rates(learning_rates, plan.device)
    options, own_options = launch_options("lookahead", plan.device)
    constants, work = _shape(plan, ready)
    grid = (programs(plan.device, own_options["ctas_per_sm"], work),)
    if ready.is_rows:
        constants["STRIDED"] = ready.strided
    kernel = lookahead_rows if ready.is_rows else lookahead_tiles
    with on_device(plan.device):
        kernel[grid](
            targets.addresses,
            targets.table,
            copies.addresses,
            copies.table,
            delta,
            rate,
            plan.chunks,
            rate_step,
            PARAMETER=targets.dtype,
            COPY=copies.dtype,
            ALIGNED=targets.aligned and copies.aligned,
            **constants,
            **options,
        )
    written(*ahead)


def _shape(plan: ChunkPlan, ready: Planned) -> tuple[dict[str, Any], int]:
    """Constants that describe a class's tiles, and how many tiles there are."""
    if ready.is_rows:
        tiles = triton.cdiv(plan.chunks, ready.rows_per_tile)
        return {"R": ready.rows_per_tile, "L": ready.length, "W": ready.W}, tiles
    return {"h": plan.h, "w": plan.w, "H": ready.H, "W": ready.W}, plan.chunks


def _decoding(
    plan: ChunkPlan, ready: Planned, m: int, *, is_exact: bool = False
) -> tuple[tuple[int], dict[str, Any], dict[str, Any]]:
    """Grid, constants and options of a kernel that decodes `m` entries per chunk."""
    options, own = launch_options("rows" if ready.is_rows else "apply", plan.device)
    constants, work = _shape(plan, ready)
    grid = (programs(plan.device, own["ctas_per_sm"], work),)
    if ready.is_rows:
        constants["MB"] = ROW_ENTRIES
    else:
        scattered = own["scattered"] if is_exact else None
        constants["E"], constants["ONE_PASS"] = entries_at_once(m, own["entries"], scattered)
    return grid, constants, options


def _values(entries: Entries) -> Tensor:
    values = entries.values.contiguous()
    return values.view(torch.uint8) if values.dtype == torch.bool else values
