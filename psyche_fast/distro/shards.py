"""Sharded parameters (DTensor: FSDP2, tensor parallelism): which chunks this rank works on.

A chunk is transformed on one rank only (but for ranks that hold the same data). Where the cut into
shards falls on the chunks' edges, a rank works on its own shard where it lies, and nothing travels.
The chunks of other parameters are divided among the ranks that share them: gradients travel from
shards to chunks, parameters back, those of all such parameters together.

Whole tensors exist for `state_dict` and for results that leave the replica only.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from psyche_fast.distro.chunks import ParameterLayout
from psyche_fast.sharding import (
    cuts,
    gathered_numbers,
    local_gradient,
    local_tensor,
    part_of,
    placed_like,
    sharing_group,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Slab:
    """A shard: where it begins in the whole tensor, and its sizes."""

    start: tuple[int, ...]
    shape: tuple[int, ...]


def is_aligned(whole: ParameterLayout, parameter: DTensor) -> bool:
    """Whether no chunk of a parameter is cut by the edge of a shard, on any rank.

    Args:
        whole: how the whole parameter is cut into chunks.
        parameter: sharded.
    """
    sides = (*[1] * (len(whole.shape) - 2), whole.h, whole.w)[-len(whole.shape) :]
    sizes = list(whole.shape)
    for dim, axis in cuts(parameter):
        size = -(-sizes[dim] // parameter.device_mesh.size(axis))  # of all shards but the last
        if size % sides[dim] and size < sizes[dim]:
            return False
        sizes[dim] = size
    return True


def slab(parameter: DTensor) -> Slab:
    """Where this rank's shard begins in the whole parameter, and its sizes."""
    ranges = part_of(parameter)
    return Slab(tuple(r.start for r in ranges), tuple(r.stop - r.start for r in ranges))


_Shared = dict[tuple[dist.ProcessGroup, torch.dtype, torch.device], list[int]]


def own_layouts(
    parameters: Sequence[Tensor], wholes: Sequence[ParameterLayout]
) -> tuple[list[ParameterLayout], _Shared]:
    """How this rank's part of each parameter is cut.

    Args:
        parameters: plain tensors or DTensors.
        wholes: how the whole parameters are cut into chunks.

    Returns:
        the layouts, and the numbers of the parameters whose chunks are divided among the ranks that
        share them, by these ranks, dtype and device.
    """
    layouts, shared = list(wholes), _Shared()
    for i, (p, whole) in enumerate(zip(parameters, wholes, strict=True)):
        if not isinstance(p, DTensor):
            continue
        if is_aligned(whole, p):
            layouts[i] = whole.part(p.to_local().shape)
        else:
            shared.setdefault((sharing_group(p), p.dtype, p.device), []).append(i)
    for (group, _, _), members in shared.items():
        ranks, me = dist.get_world_size(group), dist.get_rank(group)
        own = divided_layouts([wholes[i] for i in members], ranks, me)
        for i, layout in zip(members, own, strict=True):
            layouts[i] = layout
    return layouts, shared


class Parts:
    """What this rank works on in place of each parameter: plain tensors of whole chunks.

    Args:
        parameters: plain tensors or DTensors; a collective over the ranks that share those of the
            latter whose chunks are cut.
        wholes: how the whole parameters are cut into chunks.

    Attributes:
        parameters: as given.
        wholes: as given.
        layouts: how this rank's part of each parameter is cut.
    """

    def __init__(self, parameters: Sequence[Tensor], wholes: Sequence[ParameterLayout]) -> None:
        self.parameters = list(parameters)
        self.wholes = list(wholes)
        self.layouts, shared = own_layouts(parameters, wholes)
        self._scattered: list[tuple[list[int], Scattered]] = []
        self._where: dict[int, tuple[Scattered, int]] = {}
        for (group, _, device), members in shared.items():
            slabs = [slab(parameters[i]) for i in members]  # type: ignore[arg-type]
            moved = Scattered([wholes[i] for i in members], slabs, group, device)
            self._scattered.append((members, moved))
            for number, i in enumerate(members):
                assert self.layouts[i] == moved.layouts[number]
                self._where[i] = (moved, number)

    @cached_property
    def _chunks(self) -> dict[int, Tensor]:
        """Memory for divided chunks by parameter, for those who work on parameters themselves."""
        return {
            i: torch.empty(
                self.layouts[i].shape, dtype=self.parameters[i].dtype, device=moved.device
            )
            for i, (moved, _) in self._where.items()
        }

    def tensors(self) -> list[Tensor]:
        """This rank's part of each parameter, sharing the parameter's memory where it can."""
        return [
            self._chunks[i] if i in self._chunks else local_tensor(p.detach())
            for i, p in enumerate(self.parameters)
        ]

    def gradients(self) -> list[Tensor | None]:
        """This rank's part of each gradient; a collective where chunks have been divided."""
        return self.of_gradients([local_gradient(p) for p in self.parameters])

    def of_gradients(self, shards: Sequence[Tensor | None]) -> list[Tensor | None]:
        """This rank's part of what there is of shards, of any dtype; None for zero.

        Args:
            shards: one per parameter. A collective where chunks have been divided.
        """
        parts = list(shards)
        for members, moved in self._scattered:
            dtype = self.parameters[members[0]].dtype
            for gradient in [g for i in members if (g := parts[i]) is not None]:
                dtype = torch.promote_types(dtype, gradient.dtype)
            given = [
                moved.zeros(number, dtype) if (g := parts[i]) is None else g.to(dtype)
                for number, i in enumerate(members)
            ]
            for i, chunks in zip(members, moved.to_chunks(given), strict=True):
                parts[i] = chunks
        return parts

    def of(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """This rank's part of tensors that lie as the parameters do, in their memory where it can.

        Args:
            tensors: one per parameter, of any dtype; those whose chunks are divided among the same
                ranks of one dtype. A collective of these.
        """
        parts = [local_tensor(t.detach()) for t in tensors]
        for members, moved in self._scattered:
            chunks = moved.to_chunks([parts[i] for i in members])
            for i, own in zip(members, chunks, strict=True):
                parts[i] = own
        return parts

    def shards(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """What `of` made the parts of; a collective where chunks have been divided."""
        shards = list(parts)
        for members, moved in self._scattered:
            given = moved.to_shards([parts[i] for i in members])
            for i, shard in zip(members, given, strict=True):
                shards[i] = shard
        return shards

    def bring_back(self, parts: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
        """Write divided chunks of `of` to the tensors that they came from; a collective."""
        shards = self.shards(parts)
        for i in self._chunks:
            local_tensor(tensors[i].detach()).copy_(shards[i])

    def pull(self) -> None:
        """Bring divided chunks up to date with the parameters; a collective."""
        parts = self.of(self.parameters)
        for i, chunks in self._chunks.items():
            chunks.copy_(parts[i])

    def push(self) -> None:
        """Bring parameters up to date with their divided chunks; a collective."""
        self.bring_back(self.tensors(), self.parameters)

    def summed(self, values: Tensor) -> Tensor:
        """Sums over the ranks that have parts of a parameter, in their order: the same on all.

        Args:
            values: `[parameters, ...]`, of this rank's parts. A collective where there are shards.
        """
        sums, sharing = values.clone(), dict[dist.ProcessGroup, list[int]]()
        for i, p in enumerate(self.parameters):
            if isinstance(p, DTensor) and cuts(p):
                sharing.setdefault(sharing_group(p), []).append(i)
        for group, members in sharing.items():
            own = values[members]
            parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
            dist.all_gather(parts, own, group=group)
            sums[members] = torch.stack(parts).sum(0)
        return sums

    @property
    def are_shards(self) -> bool:
        """Whether this rank works on all parameters where they lie."""
        return not self._where

    def lies_as_shard(self, position: int) -> bool:
        """Whether this rank works on a parameter where it lies, and not on divided chunks."""
        return position not in self._where

    def whole(self, position: int, part: Tensor) -> Tensor:
        """A tensor over all chunks of a parameter, of which each rank has its part.

        Args:
            position: the parameter's number.
            part: `[*chunks, ...]` as `layouts[position].lead` has the chunks; any dtype.

        Returns:
            `[*chunks of the whole, ...]`: a DTensor for a shard that lies where the parameter does,
            else plain and the same on every rank. A collective for divided chunks.
        """
        p, lead = self.parameters[position], self.wholes[position].lead
        if not isinstance(p, DTensor):
            return part
        shape = torch.Size((*lead, *part.shape[len(self.layouts[position].lead) :]))
        if position in self._where:
            moved, number = self._where[position]
            return moved.gather(number, part).view(shape)
        return placed_like(part, p, shape)

    def own(self, position: int, whole: Tensor) -> Tensor:
        """This rank's part of a plain tensor over all chunks of a parameter; see `whole`."""
        p = self.parameters[position]
        if not isinstance(p, DTensor):
            return whole
        if position in self._where:
            moved, number = self._where[position]
            rest = whole.shape[len(self.wholes[position].lead) :]
            return moved.own(number, whole.reshape(-1, *rest))
        # src_data_rank=None: every rank holds the same whole tensor.
        shard = distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None)
        return shard.to_local()


def _slabs(numbers: list[int], dims: Sequence[int]) -> list[Slab]:
    rest = iter(numbers)
    return [Slab(*(tuple(itertools.islice(rest, n)) for _ in range(2))) for n in dims]


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
        device: as given.
    """

    def __init__(
        self,
        wholes: Sequence[ParameterLayout],
        slabs: Sequence[Slab],
        group: dist.ProcessGroup,
        device: torch.device,
    ) -> None:
        self._wholes, self._group, self.device = list(wholes), group, device
        ranks, me = dist.get_world_size(group), dist.get_rank(group)
        everyones = [
            _slabs(numbers, [len(s.start) for s in slabs])
            for numbers in gathered_numbers(
                [n for s in slabs for n in (*s.start, *s.shape)], group, device
            )
        ]
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
