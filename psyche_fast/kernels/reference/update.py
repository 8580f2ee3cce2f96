"""Rates, and the passages between parameters and their chunks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from psyche_fast.kernels.plan import ChunkPlan, Piece, Rates, Slice, chunk_view

Factors: TypeAlias = Sequence[float | Tensor]
"""One per member: numbers, or 0-d tensors on an accelerator, which is not waited for."""


def per_member(plan: ChunkPlan, rates: Rates | None) -> Factors:
    """Rates as one number or 0-d tensor per member; None stands for 1."""
    count = len(plan.members)
    if rates is None:
        return [1.0] * count
    if not isinstance(rates, Tensor):
        return rates
    rates = rates.expand(count)
    # On a CPU there is no device to wait for, and numbers are faster.
    return rates.tolist() if rates.device.type == "cpu" else rates.unbind()


def of_pieces(part: Slice, factors: Factors) -> Factors:
    """One factor per piece."""
    return [factors[piece.slot] for piece in part.pieces]


def piece_view(plan: ChunkPlan, piece: Piece, tensor: Tensor) -> Tensor:
    """View of one piece of a parameter, or of a tensor of its shape.

    `[*lead, h, w]`; a vector stays flat.
    """
    if tensor.dim() < 2:
        flat = tensor if tensor.dim() == 1 else tensor.view(1)
        if not piece.index:
            return flat
        (chosen,) = piece.index
        assert isinstance(chosen, slice)
        return flat[chosen.start * plan.w : chosen.stop * plan.w]
    view = chunk_view(tensor, plan.h, plan.w)
    return view[piece.index] if piece.index else view


def parameter_views(plan: ChunkPlan, part: Slice, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Views of the members' tensors, one per piece."""
    return [piece_view(plan, piece, tensors[piece.slot]) for piece in part.pieces]


def chunk_views(plan: ChunkPlan, part: Slice, chunks: Tensor) -> list[Tensor]:
    """Views of the slice's chunks, one per piece, of the same shapes as the parameters'."""
    flat = chunks.view(-1).split([(p.stop - p.start) * plan.totalk for p in part.pieces])
    return [
        chunk
        if len(plan.members[piece.slot].lead) == 1
        else chunk.view(*piece.lead, plan.h, plan.w)
        for piece, chunk in zip(part.pieces, flat, strict=True)
    ]


def add_scaled(targets: Sequence[Tensor], sources: Sequence[Tensor], factors: Factors) -> None:
    """`target += factor * source` in float32 or wider, rounded once."""
    if not targets:
        return
    first = factors[0]
    if not isinstance(first, Tensor) and all(factor == first for factor in factors):
        torch._foreach_add_(list(targets), list(sources), alpha=first)
        return
    for target, source, factor in zip(targets, sources, factors, strict=True):
        if isinstance(factor, Tensor):
            wide = torch.promote_types(source.dtype, factor.dtype)
            target.add_(source.to(wide) * factor)
        else:
            target.add_(source, alpha=factor)


def signed_step(
    plan: ChunkPlan,
    part: Slice,
    parameters: Sequence[Tensor],
    direction: Tensor,
    rates: Factors,
    shrinks: Factors | None = None,
) -> None:
    """`parameter = shrink * parameter + rate * direction` for the chunks of one slice.

    Two roundings to the compute dtype, as on a GPU, and one to the parameter's. `direction` is
    `[part.stop - part.start, h, w]` in the compute dtype, in which all arithmetic then is, learning
    rate included.
    """
    views = parameter_views(plan, part, parameters)
    directions = chunk_views(plan, part, direction)
    factors = of_pieces(part, rates)
    if shrinks is None:
        add_scaled(views, directions, factors)
        return
    compute = plan.compute_dtype
    wide = views if views and views[0].dtype == compute else [v.to(compute) for v in views]
    for view, shrink in zip(wide, of_pieces(part, shrinks), strict=True):
        view.mul_(shrink)
    add_scaled(wide, directions, factors)
    if wide is not views:
        torch._foreach_copy_(views, wide)
