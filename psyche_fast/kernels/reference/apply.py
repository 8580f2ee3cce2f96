"""Sign updates of the parameters: the peers' mean, and the look-ahead."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from psyche_fast.kernels.plan import ChunkPlan, Entries, Rates, Slice
from psyche_fast.kernels.reference.decode import Decoder
from psyche_fast.kernels.reference.direction import Descent, exact_product
from psyche_fast.kernels.reference.transform import ieee_matmul
from psyche_fast.kernels.reference.update import (
    Factors,
    add_scaled,
    chunk_views,
    of_pieces,
    parameter_views,
    per_member,
    signed_step,
)
from psyche_fast.kernels.reference.workspace import groups


def exact_products(a: Tensor, b: Tensor) -> Tensor:
    """`P(A, B)` of limbs, float32 `[2, N, N]`, as `apply` comes to it."""
    with ieee_matmul():
        return exact_product(*a, *b)


def subtract(plan: ChunkPlan, delta: Tensor, entries: Entries) -> None:
    """See `psyche_fast.kernels.apply.subtract`."""
    with ieee_matmul():
        for group in groups(plan):
            sent = Decoder(plan, entries, group[0].start, group[-1].stop)
            for part in group:
                sent.subtract_from(delta[part.start : part.stop], part.start)


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
    rates = per_member(plan, learning_rates)
    factors = None if shrinks is None else per_member(plan, shrinks)
    with ieee_matmul():
        for group in groups(plan, Descent.held(plan, entries)):
            direction = Descent(plan, entries, group[0].start, group[-1].stop)
            for part in group:
                minus = direction.chunks(part.start, part.stop)
                signed_step(plan, part, parameters, minus, rates, factors)
                if ahead is not None:
                    assert delta is not None
                    _look_ahead(plan, part, parameters, delta, rates, ahead)


def lookahead(
    plan: ChunkPlan,
    parameters: Sequence[Tensor],
    delta: Tensor,
    learning_rates: Rates,
    ahead: Sequence[Tensor],
) -> None:
    """See `psyche_fast.kernels.apply.lookahead`."""
    rates = per_member(plan, learning_rates)
    for part in plan.slices:
        _look_ahead(plan, part, parameters, delta, rates, ahead)


def _look_ahead(
    plan: ChunkPlan,
    part: Slice,
    parameters: Sequence[Tensor],
    delta: Tensor,
    rates: Factors,
    ahead: Sequence[Tensor],
) -> None:
    """`ahead = parameter - rate * sign(delta)` for one slice, rounded once to ahead's dtype."""
    targets, sources = (parameter_views(plan, part, tensors) for tensors in (ahead, parameters))
    direction = delta[part.start : part.stop].sign().to(plan.compute_dtype)
    negative = [-rate for rate in rates]
    if ahead and ahead[0].dtype == parameters[0].dtype:
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)
        signed_step(plan, part, ahead, direction, negative)
        return
    wide = [source.to(plan.compute_dtype, copy=True) for source in sources]
    add_scaled(wide, chunk_views(plan, part, direction), of_pieces(part, negative))
    torch._foreach_copy_(targets, wide)
