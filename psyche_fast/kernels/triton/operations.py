"""Launchers of the kernels: the operations of `psyche_fast.kernels` on the GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from psyche_fast.kernels.plan import ChunkPlan, Entries, Rates
from psyche_fast.kernels.reference.encode import _undo
from psyche_fast.kernels.triton.apply import apply_tiles, lookahead_tiles, subtract_tiles
from psyche_fast.kernels.triton.encode import encode_tiles
from psyche_fast.kernels.triton.launch import (
    DTYPES,
    ROW_ENTRIES,
    Members,
    Planned,
    encode_constants,
    entries_at_once,
    launch_options,
    on_device,
    planned,
    programs,
    rates,
    written,
)
from psyche_fast.kernels.triton.rows import (
    apply_rows,
    encode_rows,
    lookahead_rows,
    subtract_rows,
)


def encode(
    plan: ChunkPlan,
    delta: Tensor,
    gradients: Sequence[Tensor | None],
    learning_rates: Rates,
    *,
    decay: float,
    gradient_scale: float | Tensor | None,
    previous: Entries | None,
    parameters: Sequence[Tensor] | None,
    previous_rates: Rates | None,
    shrinks: Rates | None,
) -> Entries:
    """See `psyche_fast.kernels.encode`."""
    assert parameters is None or previous_rates is not None
    indices = torch.empty(plan.chunks, plan.k, dtype=plan.index_dtype, device=plan.device)
    values = torch.empty(plan.chunks, plan.k, dtype=plan.dtype, device=plan.device)
    own = Entries(indices, values, unique=True)
    if plan.chunks == 0:
        return own
    if previous is not None and not _decodable(plan, previous):
        if parameters is not None:  # the undo wants delta from before
            for part in plan.slices:
                before = delta[part.start : part.stop]
                _undo(plan, part, before, parameters, previous_rates, shrinks)
            parameters = None
        subtract(plan, delta, previous)
        previous = None
    ready = planned(plan)
    gradients = _uniform(gradients)  # by name: copies have to live until the launch
    sources = ready.members(gradients, "gradient")
    targets = sources if parameters is None else ready.members(parameters, "parameter")
    rate, rate_step = rates(learning_rates, plan.device)
    back, back_step = rates(previous_rates, plan.device)
    shrink, shrink_step = rates(shrinks, plan.device)
    scale = gradient_scale
    if not isinstance(scale, Tensor):
        scale, _ = rates([1.0 if scale is None else scale], plan.device)
    sent = own if previous is None else previous
    m = 0 if previous is None else previous.indices.shape[1]
    common = {
        "K": plan.k,
        "M": m,
        "GRADIENT": sources.dtype,
        "PARAMETER": DTYPES[plan.dtype],
        "IN_PLACE": parameters is not None,
        "ALIGNED": sources.aligned and targets.aligned,
    }
    steps = (rate_step, back_step, shrink_step)
    if ready.is_rows:
        options, own_options = launch_options("rows", plan.device)
        work = triton.cdiv(plan.chunks, ready.rows_per_tile)
        grid = (programs(plan.device, own_options["ctas_per_sm"], work),)
        size = grid[0] * ready.rows_per_tile * ready.W
        scratch = ready.scratch(torch.float32, size, plan.device)
        with on_device(plan.device):
            encode_rows[grid](
                sources.addresses,
                sources.table,
                delta,
                ready.forward_basis,
                sent.indices,
                sent.values,
                indices,
                values,
                scratch,
                rate,
                scale,
                targets.addresses,
                targets.table,
                back,
                shrink,
                decay,
                plan.chunks,
                *steps,
                MP=triton.next_power_of_2(max(m, 1)),
                R=ready.rows_per_tile,
                L=ready.length,
                W=ready.W,
                STRIDED=ready.strided,
                **common,
                **options,
            )
        written(delta, *(parameters or ()))
        return own
    options, own_options = launch_options("encode", plan.device)
    together = own_options["tiles"]
    work = triton.cdiv(plan.chunks, together)
    grid = (programs(plan.device, own_options["ctas_per_sm"], work),)
    scratch = ready.scratch(
        torch.float32, grid[0] * together * (ready.H * ready.W + ready.H), plan.device
    )
    with on_device(plan.device):
        encode_tiles[grid](
            sources.addresses,
            sources.table,
            delta,
            ready.forward_basis,
            ready.rows_h,
            ready.rows_w,
            ready.zeros,
            sent.indices,
            sent.values,
            indices,
            values,
            scratch,
            rate,
            scale,
            targets.addresses,
            targets.table,
            back,
            shrink,
            decay,
            plan.chunks,
            *steps,
            T=together,
            h=plan.h,
            w=plan.w,
            H=ready.H,
            W=ready.W,
            **encode_constants(plan.k, m),
            SELECT_ROWS=own_options["select_rows"],
            STREAM=own_options["stream"],
            KEEP=own_options["keep"],
            **{k: v for k, v in common.items() if k not in ("K", "M")},
            **options,
        )
    written(delta, *(parameters or ()))
    return own


def subtract(plan: ChunkPlan, delta: Tensor, entries: Entries) -> None:
    """See `psyche_fast.kernels.subtract`."""
    m = entries.indices.shape[1]
    if plan.chunks == 0 or m == 0:
        return
    ready = planned(plan)
    grid, scratch, constants, options = _decoding(plan, ready, m)
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
    *,
    shrinks: Rates | None,
    ahead: Sequence[Tensor] | None,
    delta: Tensor | None,
) -> None:
    """See `psyche_fast.kernels.apply`."""
    assert ahead is None or delta is not None
    m = entries.indices.shape[1]
    if plan.chunks == 0:
        return
    ready = planned(plan)
    targets = ready.members(parameters, "parameter")
    mode, copies = _look_ahead(ready, targets, ahead)
    rate, rate_step = rates(learning_rates, plan.device)
    shrink, shrink_step = rates(shrinks, plan.device)
    grid, scratch, constants, options = _decoding(plan, ready, m)
    if ready.is_rows:
        kernel = apply_rows
        constants["STRIDED"] = ready.strided
    else:
        kernel = apply_tiles
        constants["SHRINK"] = shrinks is not None
    with on_device(plan.device):
        kernel[grid](
            targets.addresses,
            targets.table,
            copies.addresses,
            copies.table,
            shrink if delta is None else delta,  # not read where there is no look-ahead
            ready.inverse_basis,
            entries.indices.contiguous(),
            _values(entries),
            scratch,
            rate,
            shrink,
            plan.chunks,
            m,
            rate_step,
            shrink_step,
            SIGNS=entries.values.dtype == torch.bool,
            AHEAD=mode,
            PARAMETER=targets.dtype,
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
    *,
    ahead: Sequence[Tensor] | None,
) -> None:
    """See `psyche_fast.kernels.lookahead`."""
    if plan.chunks == 0:
        return
    ready = planned(plan)
    targets = ready.members(parameters, "parameter")
    copies = targets if ahead is None else ready.members(ahead, "look-ahead")
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
            ALIGNED=targets.aligned and copies.aligned,
            **constants,
            **options,
        )
    written(*(parameters if ahead is None else ahead))


def _decodable(plan: ChunkPlan, entries: Entries) -> bool:
    """Whether encode can decode own entries by itself: distinct ones, and in order if all."""
    return entries.unique and entries.indices.is_contiguous() and entries.values.is_contiguous()


def _shape(plan: ChunkPlan, ready: Planned) -> tuple[dict[str, Any], int]:
    """Constants that describe a class's tiles, and how many tiles there are."""
    if ready.is_rows:
        tiles = triton.cdiv(plan.chunks, ready.rows_per_tile)
        return {"R": ready.rows_per_tile, "L": ready.length, "W": ready.W}, tiles
    return {"h": plan.h, "w": plan.w, "H": ready.H, "W": ready.W}, plan.chunks


def _decoding(
    plan: ChunkPlan, ready: Planned, m: int
) -> tuple[tuple[int], Tensor, dict[str, Any], dict[str, Any]]:
    """Grid, scratch, constants and options of a kernel that decodes `m` entries per chunk."""
    options, own = launch_options("rows" if ready.is_rows else "apply", plan.device)
    constants, work = _shape(plan, ready)
    grid = (programs(plan.device, own["ctas_per_sm"], work),)
    if ready.is_rows:
        constants["MB"] = ROW_ENTRIES
        elements = ready.rows_per_tile * ready.W
    else:
        constants["E"], constants["ONE_PASS"] = entries_at_once(m, own["entries"])
        elements = ready.H * ready.W
    return grid, ready.scratch(torch.int32, grid[0] * 2 * elements, plan.device), constants, options


def _look_ahead(
    ready: Planned, targets: Members, ahead: Sequence[Tensor] | None
) -> tuple[str, Members]:
    if ahead is None:
        return "no", targets
    copies = ready.members(ahead, "look-ahead")
    # The same memory is found as the same members, be it by other tensors.
    return "in place" if copies is targets else "copy", copies


def _uniform(gradients: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """Gradients as the kernels read them: rows of neighbours, all of one dtype."""
    dtypes = {g.dtype for g in gradients if g is not None}
    if len(dtypes) > 1 or torch.float64 in dtypes:
        gradients = [None if g is None else g.to(torch.float32) for g in gradients]
    return [
        g.contiguous() if g is not None and g.dim() and g.stride(-1) != 1 else g for g in gradients
    ]


def _values(entries: Entries) -> Tensor:
    values = entries.values.contiguous()
    return values.view(torch.uint8) if values.dtype == torch.bool else values
