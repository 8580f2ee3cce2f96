"""The linear outer step of a chunk class, and its kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from psyche_fast.kernels.outer import Local
from psyche_fast.kernels.plan import ChunkPlan, Entries
from psyche_fast.kernels.triton.apply import locate
from psyche_fast.kernels.triton.arithmetic import mean_coefficients, power_of_two, sandwich
from psyche_fast.kernels.triton.launch import (
    ROW_ENTRIES,
    TILE_ELEMENTS,
    entries_at_once,
    launch_options,
    on_device,
    padded,
    planned,
    programs,
    written,
)
from psyche_fast.kernels.triton.plain import locate_plain
from psyche_fast.kernels.triton.rows import mean_row_coefficients, times_right

KEEP_LOCAL, COPY_LOCAL, MIX_LOCAL, REBASE_LOCAL = range(4)


@triton.jit
def step_out(
    x, p_at, u_at, own_at, since_at, inside, length, momentum, mix,
    NESTEROV: tl.constexpr, MIX: tl.constexpr,
):  # fmt: skip
    """The step by a mean `x`, from addresses of the same shape, and the mix."""
    p = tl.load(p_at, mask=inside, other=0.0)
    if NESTEROV:
        u = tl.load(u_at, mask=inside, other=0.0) * momentum + x
        tl.store(u_at, u, mask=inside)
        x = tl.fma(u, momentum, x)
    p = tl.fma(x, -length, p)
    tl.store(p_at, p, mask=inside)
    if MIX == 1:
        tl.store(own_at, p, mask=inside)
    elif MIX > 1:
        own = tl.load(own_at, mask=inside, other=0.0)
        if MIX == 2:
            own = tl.fma(p, 1.0 - mix, own * mix)
        else:
            own = own - tl.load(since_at, mask=inside, other=0.0) + p
        tl.store(own_at, own, mask=inside)


@triton.jit(do_not_specialize=["tiles", "m", "divisor"])
def outer_tiles(
    members, table, u_members, u_table, own_members, own_table, since_members, since_table,
    split_basis, indices, values, scratch, length, momentum, mix, share, tiles, m, divisor,
    E: tl.constexpr, ONE_PASS: tl.constexpr, NAMED: tl.constexpr, SIGNS: tl.constexpr,
    NESTEROV: tl.constexpr, MIX: tl.constexpr, h: tl.constexpr, w: tl.constexpr, H: tl.constexpr,
    W: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Chunks of matrices with transform; tensors are float32, `members` and `table` as elsewhere.

    Args:
        split_basis: as of `subtract_tiles`, as are `indices`, `values`, `scratch` and `m`.
        divisor: of sums, unless it is the number of entries that name a coefficient (NAMED).
        NESTEROV: whether there are momenta.
        MIX: what becomes of the replica's own: 0 nothing, 1 a copy, 2 a mix, 3 rebased.
    """
    pid = tl.program_id(0)
    i = tl.arange(0, H)[:, None]
    j = tl.arange(0, W)[None, :]
    inside = (i < h) & (j < w)
    own = scratch + pid.to(tl.int64) * (2 * H * W)
    for tile in range(pid, tiles, tl.num_programs(0)):
        x, shift = mean_coefficients(
            indices, values, tl.cast(tile, tl.int64) * m, m, own, E, ONE_PASS, SIGNS, H, W, w,
            NAMED, divisor,
        )  # fmt: skip
        x = sandwich(x, split_basis, False, H, W)
        half = shift >> 1
        x = x * power_of_two(-half) * power_of_two(half - shift)
        p_at, _ = locate(members, table, tile, i, j, tl.float32, ALIGNED)
        u_at, _ = locate(u_members, u_table, tile, i, j, tl.float32, ALIGNED)
        own_at, _ = locate(own_members, own_table, tile, i, j, tl.float32, ALIGNED)
        since_at, _ = locate(since_members, since_table, tile, i, j, tl.float32, ALIGNED)
        step_out(x, p_at, u_at, own_at, since_at, inside, length, momentum, mix, NESTEROV, MIX)


@triton.jit(do_not_specialize=["chunks", "m", "divisor"])
def outer_plain(
    members, table, u_members, u_table, own_members, own_table, since_members, since_table,
    split_basis, indices, values, scratch, length, momentum, mix, share, chunks, m, divisor,
    MB: tl.constexpr, DENSE: tl.constexpr, TRANSFORM: tl.constexpr, NAMED: tl.constexpr,
    SIGNS: tl.constexpr, NESTEROV: tl.constexpr, MIX: tl.constexpr, R: tl.constexpr,
    L: tl.constexpr, N: tl.constexpr, w: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """As `outer_tiles`, for chunks with one dimension, and for all without transform.

    Args:
        split_basis: as of `encode_rows` (TRANSFORM).
        values: DENSE: float32 `[m, chunks, L]`, of `m` replicas, and there are no indices.
        share: `1 / m`, with DENSE.
    """
    pid = tl.program_id(0)
    e = tl.arange(0, N)[None, :]
    scratch += pid.to(tl.int64) * (2 * R * N)
    for first in range(pid * R, chunks, tl.num_programs(0) * R):
        chunk = first + tl.arange(0, R)
        live = chunk < chunks
        inside = live[:, None] & (e < L)
        if DENSE:
            at = values + chunk.to(tl.int64)[:, None] * L + e
            x = tl.load(at, mask=inside, other=0.0)
            for _ in range(1, m):
                at += tl.cast(chunks, tl.int64) * L
                x += tl.load(at, mask=inside, other=0.0)
            x *= share
        else:
            x, shift = mean_row_coefficients(
                indices, values, chunk, live, m, scratch, MB, SIGNS, R, N, NAMED, divisor
            )
            if TRANSFORM:
                x = times_right(x, split_basis + 2 * N * N, False, N)
            half = shift >> 1
            x = x * power_of_two(-half)[:, None] * power_of_two(half - shift)[:, None]
        p_at, _, _ = locate_plain(members, table, chunk, live, e, L, w, tl.float32, ALIGNED)
        u_at, _, _ = locate_plain(u_members, u_table, chunk, live, e, L, w, tl.float32, ALIGNED)
        own_at, _, _ = locate_plain(
            own_members, own_table, chunk, live, e, L, w, tl.float32, ALIGNED
        )
        since_at, _, _ = locate_plain(
            since_members, since_table, chunk, live, e, L, w, tl.float32, ALIGNED
        )
        step_out(x, p_at, u_at, own_at, since_at, inside, length, momentum, mix, NESTEROV, MIX)


def outer(
    plan: ChunkPlan,
    shared: Sequence[Tensor],
    received: Entries | Tensor,
    length: float,
    replicas: int | None,
    momenta: Sequence[Tensor] | None,
    momentum: float,
    local: Local | None,
) -> None:
    """See `psyche_fast.kernels.outer.outer`."""
    if plan.chunks == 0:
        return
    ready = planned(plan)
    targets = ready.members(shared, "shared parameter")
    found = [targets] * 4
    mix, how = 0.0, KEEP_LOCAL
    if momenta is not None:
        found[1] = ready.members(momenta, "momentum")
    if local is not None:
        found[2] = ready.members(local.tensors, "own parameter")
        mix, how = local.mix, COPY_LOCAL if local.mix == 0.0 else MIX_LOCAL
        if local.since is not None:
            found[3], how = ready.members(local.since, "sent parameter"), REBASE_LOCAL
    dense = isinstance(received, Tensor)
    if isinstance(received, Tensor):
        indices = values = received.contiguous()
        m = len(received)
    else:
        m = received.indices.shape[1]
        indices, values = received.indices.contiguous(), received.values.contiguous()
    signs = values.dtype == torch.bool
    values = values.view(torch.uint8) if signs else values
    options, own = launch_options("outer", plan.device)
    together, constants = 1, {}
    kernel: Any = outer_tiles
    if plan.is_transformed and not ready.is_rows:
        at_once, one_pass = entries_at_once(m, own["entries"])
        elements = ready.H * ready.W
        constants = {
            "E": at_once, "ONE_PASS": one_pass, "h": plan.h, "w": plan.w, "H": ready.H,
            "W": ready.W,
        }  # fmt: skip
    else:
        kernel, together, width = outer_plain, ready.rows_per_tile, padded(ready.length)
        elements = 0 if dense else together * width
        constants = {
            "MB": row_entries(together, m), "DENSE": dense, "TRANSFORM": plan.is_transformed,
            "R": together, "L": ready.length, "N": width, "w": plan.w,
        }  # fmt: skip
    grid = (programs(plan.device, own["ctas_per_sm"], triton.cdiv(plan.chunks, together)),)
    scratch = ready.scratch(torch.int32, max(1, grid[0] * 2 * elements), plan.device)
    places = [t for one in found for t in (one.addresses, one.table)]
    with on_device(plan.device):
        kernel[grid](
            *places, ready.inverse_basis if plan.is_transformed else values, indices, values,
            scratch, length, momentum, mix, 1.0 / max(m, 1), plan.chunks, m, replicas or 1,
            NAMED=replicas is None, SIGNS=signs, NESTEROV=momenta is not None, MIX=how,
            ALIGNED=all(one.aligned for one in found), **constants, **options,
        )  # fmt: skip
    written(*shared, *(momenta or ()), *(local.tensors if local else ()))


def row_entries(rows: int, m: int) -> int:
    """Entries of each of a tile's rows that are handled at once."""
    return max(ROW_ENTRIES, min(triton.next_power_of_2(m), TILE_ELEMENTS // 4 // rows))
