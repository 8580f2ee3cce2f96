"""Chunks that the edges of shards cut, divided among the ranks that share them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from psyche_fast.distro.chunks import ParameterLayout


@dataclass(frozen=True)
class Slab:
    """A shard: where it begins in the whole tensor, and its sizes."""

    start: tuple[int, ...]
    shape: tuple[int, ...]


class Scattered:
    """The way of several parameters' elements from shards to whole chunks and back.

    Of every parameter each rank gets a run of the chunks. All parameters travel in one collective.

    Args:
        wholes: how the whole parameters are cut into chunks.
        slabs: this rank's shard of each.
        group: the ranks that share them. Making this is a collective.
        device: where index tables are kept: 8 bytes for every element of this rank's shards, and
            as many for its chunks.

    Attributes:
        layouts: this rank's chunks of each parameter: `[n * h, w]`, or `[n * w]` of a vector.
    """

    def __init__(
        self,
        wholes: Sequence[ParameterLayout],
        slabs: Sequence[Slab],
        group: dist.ProcessGroup,
        device: torch.device,
    ) -> None:
        self._wholes, self._group = list(wholes), group
        ranks, me = dist.get_world_size(group), dist.get_rank(group)
        everyones: list[list[Slab]] = [[] for _ in range(ranks)]
        dist.all_gather_object(everyones, list(slabs), group=group)
        self._shapes = [s.shape for s in slabs]
        self._bounds = _divide(wholes, ranks)
        self._runs = [bounds[me] for bounds in self._bounds]
        self.layouts = divided_layouts(wholes, ranks, me)
        positions = [_positions(w, slab) for w, slab in zip(wholes, slabs, strict=True)]
        gives = [self._route(positions, rank)[0] for rank in range(ranks)]
        takes = []
        for theirs in everyones:
            lie = [_positions(w, slab) for w, slab in zip(wholes, theirs, strict=True)]
            takes.append(self._route(lie, me)[1])
        self._gives_to, self._takes_from = [len(g) for g in gives], [len(t) for t in takes]
        self._gives, self._takes = torch.cat(gives).to(device), torch.cat(takes).to(device)

    def _route(self, positions: Sequence[Tensor], owner: int) -> tuple[Tensor, Tensor]:
        """Elements of a rank's shards that belong to the chunks of `owner`, in the shards' order.

        Returns:
            Their numbers in all shards one after the other, and in all of the owner's chunks.
        """
        local, chunk = [], []
        shards = chunks = 0
        for w, position, bounds in zip(self._wholes, positions, self._bounds, strict=True):
            first, last = bounds[owner]
            mine = (
                ((position >= first * w.totalk) & (position < last * w.totalk)).nonzero().view(-1)
            )
            local.append(mine + shards)
            chunk.append(position[mine] - first * w.totalk + chunks)
            shards += position.numel()
            chunks += (last - first) * w.totalk
        return torch.cat(local), torch.cat(chunk)

    def zeros(self, number: int, dtype: torch.dtype) -> Tensor:
        """Zeros in the shape of this rank's shard of a parameter."""
        return torch.zeros(self._shapes[number], dtype=dtype, device=self._gives.device)

    def to_chunks(self, shards: Sequence[Tensor]) -> list[Tensor]:
        """This rank's chunks from everybody's shards, all of one dtype; a collective."""
        flat = torch.cat([s.reshape(-1) for s in shards])
        sizes = [math.prod(p.shape) for p in self.layouts]
        chunks = flat.new_empty(sum(sizes))
        received = flat.new_empty(sum(self._takes_from))
        dist.all_to_all_single(
            received, flat[self._gives], self._takes_from, self._gives_to, group=self._group
        )
        chunks[self._takes] = received
        parts = chunks.split(sizes)
        return [c.view(p.shape) for c, p in zip(parts, self.layouts, strict=True)]

    def to_shards(self, chunks: Sequence[Tensor]) -> list[Tensor]:
        """This rank's shards from everybody's chunks, all of one dtype; a collective."""
        flat = torch.cat([c.reshape(-1) for c in chunks])
        sizes = [math.prod(shape) for shape in self._shapes]
        shards = flat.new_empty(sum(sizes))
        received = flat.new_empty(sum(self._gives_to))
        dist.all_to_all_single(
            received, flat[self._takes], self._gives_to, self._takes_from, group=self._group
        )
        shards[self._gives] = received
        parts = shards.split(sizes)
        return [s.view(shape) for s, shape in zip(parts, self._shapes, strict=True)]

    def own(self, number: int, whole: Tensor) -> Tensor:
        """This rank's part of `[chunks, ...]`."""
        first, last = self._runs[number]
        return whole[first:last]

    def gather(self, number: int, part: Tensor) -> Tensor:
        """`[chunks, ...]` from the parts of all ranks; a collective."""
        bounds = self._bounds[number]
        most = max(b - a for a, b in bounds)
        rest = part.shape[1:]
        padded = part.new_zeros(most, *rest)
        padded[: part.shape[0]] = part
        parts = [torch.empty_like(padded) for _ in bounds]
        dist.all_gather(parts, padded, group=self._group)
        whole = part.new_empty(self._wholes[number].chunks, *rest)
        for (a, b), piece in zip(bounds, parts, strict=True):
            whole[a:b] = piece[: b - a]
        return whole


def divided_layouts(
    wholes: Sequence[ParameterLayout], ranks: int, me: int
) -> list[ParameterLayout]:
    """One rank's chunks of each parameter: `[n * h, w]`, or `[n * w]` of a vector."""
    layouts = []
    for w, bounds in zip(wholes, _divide(wholes, ranks), strict=True):
        first, last = bounds[me]
        n = last - first
        layouts.append(w.part((n * w.w,) if len(w.shape) < 2 else (n * w.h, w.w)))
    return layouts


def _divide(wholes: Sequence[ParameterLayout], ranks: int) -> list[list[tuple[int, int]]]:
    # Rotated, so that many parameters of a few chunks do not all fall to the same rank.
    return [
        [_bounds(w.chunks, (rank + number) % ranks, ranks) for rank in range(ranks)]
        for number, w in enumerate(wholes)
    ]


def _bounds(chunks: int, turn: int, ranks: int) -> tuple[int, int]:
    return chunks * turn // ranks, chunks * (turn + 1) // ranks


def _positions(whole: ParameterLayout, slab: Slab) -> Tensor:
    """For every element of a shard its number when the whole is chunk after chunk."""
    sizes = (*whole.lead, whole.h, whole.w) if len(whole.shape) > 1 else (*whole.lead, whole.w)
    strides = [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]
    inner = 2 if len(whole.shape) > 1 else 1  # dimensions of a chunk
    outer = len(sizes) - inner
    position = torch.zeros((), dtype=torch.int64)
    for dim, (start, size) in enumerate(zip(slab.start, slab.shape, strict=True)):
        at = torch.arange(start, start + size)
        number = dim - (len(slab.shape) - inner)  # of the chunk's dimension, if it is one
        if number >= 0:
            side = sizes[outer + number]
            at = at // side * strides[dim] + at % side * strides[outer + number]
        else:
            at = at * strides[dim]
        position = position.unsqueeze(-1) + at
    return position.reshape(-1)
