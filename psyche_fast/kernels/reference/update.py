"""Chunk-major directions applied to parameters."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from psyche_fast.kernels.plan import ChunkPlan, Slice, chunk_view


def signed_step(
    plan: ChunkPlan,
    part: Slice,
    parameters: Sequence[Tensor],
    direction: Tensor,
    learning_rates: Sequence[float],
) -> None:
    """`parameter -= lr * direction` for the chunks of one slice.

    `direction` is `[part.stop - part.start, h, w]` in the compute dtype. That it is wider than a
    half-precision parameter matters: the subtraction is then done in the wider dtype and rounded
    once, learning rate included.
    """
    for piece in part.pieces:
        view = chunk_view(parameters[piece.slot], plan.h, plan.w)
        if piece.index:
            view = view[piece.index]
        chunks = direction[piece.start - part.start : piece.stop - part.start]
        view.sub_(chunks.view(view.shape), alpha=learning_rates[piece.slot])
