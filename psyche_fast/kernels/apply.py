"""Apply: peers' results into the parameters, with the next look-ahead; and its parts alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from psyche_fast.kernels import ops
from psyche_fast.kernels.backends import implementation
from psyche_fast.kernels.plan import ChunkPlan, Entries, Rates


def subtract(plan: ChunkPlan, delta: Tensor, entries: Entries, *, backend: str = "torch") -> None:
    """`delta -= decode(entries)`.

    Args:
        plan: the chunk class.
        delta: state `[chunks, h, w]`, updated in place.
        entries: what has been sent. Each coefficient is the mean over the entries that name it.
        backend: resolved backend name.
    """
    if torch.compiler.is_compiling():
        ops.subtract(plan.handle, delta, entries.indices, entries.values, entries.unique, backend)
        return
    implementation(backend).subtract(plan, delta, entries)


def apply(
    plan: ChunkPlan,
    parameters: Sequence[Tensor],
    entries: Entries,
    learning_rates: Rates,
    *,
    shrinks: Rates | None = None,
    ahead: Sequence[Tensor] | None = None,
    delta: Tensor | None = None,
    backend: str = "torch",
) -> None:
    """`parameter = shrink * parameter - lr * sign(decode(entries))`.

    Each coefficient is the mean over the entries that name it. With `ahead` and `delta` also
    `ahead = parameter - lr * sign(delta)`, from the parameter as it has just been rounded: the
    look-ahead for the next forward.

    Args:
        plan: the chunk class.
        parameters: one tensor per member, updated in place.
        entries: all peers' entries side by side. The result does not depend on their order but for
            the rounding of means of floats by the `torch` backend.
        learning_rates: one per member.
        shrinks: factors on the parameters (weight decay); None for 1.
        ahead: one tensor per member, written to; with `delta`. The parameters themselves stand for
            a look-ahead without a master copy.
        delta: state `[chunks, h, w]`, read.
        backend: resolved backend name.
    """
    if torch.compiler.is_compiling():
        in_place = ahead is not None and all(a is p for a, p in zip(ahead, parameters, strict=True))
        ops.apply(
            plan.handle,
            parameters,
            entries.indices,
            entries.values,
            entries.unique,
            *ops.parts(learning_rates),
            *ops.parts(shrinks),
            [] if ahead is None or in_place else ahead,
            in_place,
            delta,
            backend,
        )
        return
    implementation(backend).apply(
        plan, parameters, entries, learning_rates, shrinks=shrinks, ahead=ahead, delta=delta
    )


def lookahead(
    plan: ChunkPlan,
    parameters: Sequence[Tensor],
    delta: Tensor,
    learning_rates: Rates,
    *,
    ahead: Sequence[Tensor] | None = None,
    backend: str = "torch",
) -> None:
    """`ahead = parameter - lr * sign(delta)`, with `delta` chunk-major, `[chunks, h, w]`.

    Args:
        plan: the chunk class.
        parameters: one tensor per member.
        delta: state, read.
        learning_rates: one per member.
        ahead: where the result goes, one tensor per member; None: into the parameters.
        backend: resolved backend name.
    """
    if torch.compiler.is_compiling():
        rates = ops.parts(learning_rates)
        ops.lookahead(plan.handle, parameters, delta, *rates, list(ahead or ()), backend)
        return
    implementation(backend).lookahead(plan, parameters, delta, learning_rates, ahead=ahead)
