"""Momentum update, transform and selection of one chunk class."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from psyche_fast.kernels.plan import ChunkPlan, Entries, Slice, chunk_view
from psyche_fast.kernels.reference.decode import subtract_slice
from psyche_fast.kernels.reference.topk import largest
from psyche_fast.kernels.reference.transform import forward, ieee_matmul


def encode(
    plan: ChunkPlan,
    delta: Tensor,
    gradients: Sequence[Tensor | None],
    learning_rates: Sequence[float],
    decay: float,
    gradient_scale: float | Tensor,
    previous: Entries | None,
) -> Entries:
    """See `psyche_fast.kernels.encode`."""
    indices = torch.empty(plan.chunks, plan.k, dtype=plan.index_dtype, device=plan.device)
    values = torch.empty(plan.chunks, plan.k, dtype=plan.dtype, device=plan.device)
    with ieee_matmul():
        for part in plan.slices:
            stored = delta[part.start : part.stop]
            chunks = stored.to(plan.compute_dtype)  # the state itself unless it is kept narrower
            if previous is None:
                chunks.mul_(decay)
            else:
                subtract_slice(plan, chunks, previous, part.start, part.stop, decay)
            _accumulate(plan, part, chunks, gradients, learning_rates, gradient_scale)
            if chunks is not stored:
                stored.copy_(chunks)
                chunks.copy_(stored)  # what is sent is read from the rounded state
            coefficients = forward(plan, chunks)
            index = largest(coefficients, plan.k)
            indices[part.start : part.stop] = index
            values[part.start : part.stop] = coefficients.gather(1, index)
    return Entries(indices, values, unique=True)


def _accumulate(
    plan: ChunkPlan,
    part: Slice,
    chunks: Tensor,
    gradients: Sequence[Tensor | None],
    learning_rates: Sequence[float],
    gradient_scale: float | Tensor,
) -> None:
    """`chunks += lr * gradient_scale * gradient`."""
    for piece in part.pieces:
        gradient = gradients[piece.slot]
        if gradient is None:
            continue
        source = chunk_view(gradient, plan.h, plan.w)
        if piece.index:
            source = source[piece.index]
        target = chunks[piece.start - part.start : piece.stop - part.start].view(source.shape)
        rate = learning_rates[piece.slot]
        if isinstance(gradient_scale, Tensor):
            target.add_(source.to(plan.compute_dtype) * gradient_scale, alpha=rate)
        else:
            target.add_(source, alpha=rate * gradient_scale)
