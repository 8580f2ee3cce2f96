"""Momentum update, transform and selection of one chunk class."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from psyche_fast.kernels.plan import ChunkPlan, Entries, Rates, Slice
from psyche_fast.kernels.reference.decode import Decoder
from psyche_fast.kernels.reference.topk import largest, run_length, run_maxima
from psyche_fast.kernels.reference.transform import forward, ieee_matmul
from psyche_fast.kernels.reference.update import (
    Factors,
    add_scaled,
    chunk_views,
    per_member,
    piece_view,
)
from psyche_fast.kernels.reference.workspace import COEFFICIENTS, groups, scratch


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
    indices = torch.empty(plan.chunks, plan.k, dtype=plan.index_dtype, device=plan.device)
    values = torch.empty(plan.chunks, plan.k, dtype=plan.dtype, device=plan.device)
    run = run_length(plan.totalk, plan.k)
    sources = Sources(plan, gradients, learning_rates, gradient_scale, anchors)
    if previous is not None and share != 1.0:
        previous = Entries(previous.indices, previous.values * share, previous.unique)
    with ieee_matmul():
        for group in groups(plan):
            first, last = group[0].start, group[-1].stop
            sent = None if previous is None else Decoder(plan, previous, first, last)
            coefficients = scratch(COEFFICIENTS, (last - first, plan.totalk), plan.basis_w)
            maxima = []
            for part in group:
                chunks = take_up(plan, delta, part, decay, sources, sent)
                own = coefficients[part.start - first : part.stop - first]
                forward(plan, chunks, own)
                if run > 1:
                    maxima.append(run_maxima(own, run))
            index, value = largest(coefficients, plan.k, torch.cat(maxima) if maxima else None)
            indices[first:last] = index
            values[first:last] = value
    return Entries(indices, values, unique=True)


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
    sources = Sources(plan, gradients, learning_rates, gradient_scale, anchors)
    if previous is not None:  # few of all elements: where they lie, without a dense decode
        flat, sent = delta.view(plan.chunks, plan.totalk), previous.values * -share
        flat.scatter_add_(1, previous.indices.to(torch.int64), sent.to(delta.dtype))
    for part in plan.slices:
        take_up(plan, delta, part, decay, sources, None)


def take_up(
    plan: ChunkPlan,
    delta: Tensor,
    part: Slice,
    decay: float,
    sources: Sources,
    sent: Decoder | None,
) -> Tensor:
    """Bring a slice of the state up to date; its chunks `[n, h, w]` in the compute dtype."""
    stored = delta[part.start : part.stop]
    chunks = stored.to(plan.compute_dtype)  # the state itself unless kept narrower
    if sent is not None:
        sent.subtract_from(chunks, part.start)
    # A pass of its own: a `subtract` in advance then ends in the same bits.
    chunks.mul_(decay)
    sources.add_to(chunks, part)
    if chunks is not stored:
        stored.copy_(chunks)
        chunks.copy_(stored)  # what is sent is read from the rounded state
    return chunks


class Sources:
    """Gradients, or what parameters are away from their anchors, and the factors they come with."""

    def __init__(
        self,
        plan: ChunkPlan,
        gradients: Sequence[Tensor | None],
        learning_rates: Rates,
        scale: float | Tensor | None,
        anchors: Sequence[Tensor] | None,
    ) -> None:
        self._plan, self._gradients, self._anchors = plan, gradients, anchors
        self._rates: Factors = per_member(plan, learning_rates)
        self._scale: Tensor | None = None
        if isinstance(scale, Tensor) and scale.device.type != "cpu":
            self._scale = scale  # not waited for
            self._finite = scale.isfinite()
        elif scale is not None:
            number = float(scale)
            self._rates = [number * rate for rate in self._rates]
            if not math.isfinite(number):
                self._gradients = [None] * len(gradients)

    def write_to(self, chunks: Tensor, part: Slice) -> None:
        """`chunks = rate * scale * source`."""
        if self._anchors is None or self._scale is not None or any(r != 1.0 for r in self._rates):
            chunks.zero_()
            self.add_to(chunks, part)
            return
        for piece, target in zip(part.pieces, chunk_views(self._plan, part, chunks), strict=True):
            gradient, anchor = self._gradients[piece.slot], self._anchors[piece.slot]
            if gradient is None:
                target.zero_()
                continue
            views = [piece_view(self._plan, piece, t) for t in (anchor, gradient)]
            torch.sub(*views, out=target)

    def add_to(self, chunks: Tensor, part: Slice) -> None:
        """`chunks += rate * scale * source`."""
        sources, targets, factors = [], [], []
        for piece, target in zip(part.pieces, chunk_views(self._plan, part, chunks), strict=True):
            gradient = self._gradients[piece.slot]
            if gradient is None:
                continue
            source = piece_view(self._plan, piece, gradient)
            if self._anchors is not None:
                source = piece_view(self._plan, piece, self._anchors[piece.slot]) - source
            if self._scale is not None:
                source = source.to(chunks.dtype) * self._scale
                source = torch.where(self._finite, source, 0.0)
            sources.append(source)
            targets.append(target)
            factors.append(self._rates[piece.slot])
        add_scaled(targets, sources, factors)
