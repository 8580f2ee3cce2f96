"""Sharded parameters (DTensor: FSDP2, tensor parallelism): which chunks this rank works on.

A chunk is transformed on one rank only (but for ranks that hold the same data). Where the cut into
shards falls on the chunks' edges, a rank works on its own shard where it lies, and nothing travels.
The chunks of other parameters are divided among the ranks that share them: gradients travel from
shards to chunks, parameters back, those of all such parameters together.

Whole tensors exist for `state_dict` and for results that leave the replica only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from psyche_fast.distro.chunks import ParameterLayout
from psyche_fast.distro.results import DistroResult, check_form
from psyche_fast.distro.scattered import Scattered, Slab, divided_layouts
from psyche_fast.sharding import (
    cuts,
    full_tensor,
    local_tensor,
    part_of,
    placed_like,
    sharing_group,
)


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
        layouts: how this rank's part of each parameter is cut.
    """

    def __init__(self, parameters: Sequence[Tensor], wholes: Sequence[ParameterLayout]) -> None:
        self._parameters = list(parameters)
        self._wholes = list(wholes)
        self.layouts, shared = own_layouts(parameters, wholes)
        self._scattered: list[tuple[list[int], Scattered]] = []
        self._chunks: dict[int, Tensor] = {}
        self._where: dict[int, tuple[Scattered, int]] = {}
        for (group, dtype, device), members in shared.items():
            slabs = [slab(parameters[i]) for i in members]  # type: ignore[arg-type]
            moved = Scattered([wholes[i] for i in members], slabs, group, device)
            self._scattered.append((members, moved))
            for number, i in enumerate(members):
                assert self.layouts[i] == moved.layouts[number]
                self._where[i] = (moved, number)
                self._chunks[i] = torch.empty(
                    moved.layouts[number].shape, dtype=dtype, device=device
                )

    @property
    def any_scattered(self) -> bool:
        """Whether chunks of some parameter have been divided among ranks."""
        return bool(self._scattered)

    def tensors(self) -> list[Tensor]:
        """This rank's part of each parameter, sharing the parameter's memory where it can."""
        return [
            self._chunks[i] if i in self._chunks else local_tensor(p.detach())
            for i, p in enumerate(self._parameters)
        ]

    def gradients(self) -> list[Tensor | None]:
        """This rank's part of each gradient; a collective where chunks have been divided."""
        parts: list[Tensor | None] = []
        for p in self._parameters:
            gradient = p.grad
            if isinstance(gradient, DTensor):
                assert isinstance(p, DTensor)
                if gradient.placements != p.placements:
                    gradient = gradient.redistribute(placements=p.placements)
                gradient = gradient.to_local()
            parts.append(gradient)
        for members, moved in self._scattered:
            dtype = self._parameters[members[0]].dtype
            given = [g for i in members if (g := parts[i]) is not None]
            for gradient in given:
                dtype = torch.promote_types(dtype, gradient.dtype)
            shards = [
                moved.zeros(number, dtype) if (g := parts[i]) is None else g.to(dtype)
                for number, i in enumerate(members)
            ]
            for i, chunks in zip(members, moved.to_chunks(shards), strict=True):
                parts[i] = chunks
        return parts

    def pull(self) -> None:
        """Bring divided chunks up to date with the parameters; a collective."""
        for members, moved in self._scattered:
            shards = [local_tensor(self._parameters[i].detach()) for i in members]
            for i, chunks in zip(members, moved.to_chunks(shards), strict=True):
                self._chunks[i].copy_(chunks)

    def push(self) -> None:
        """Bring parameters up to date with their divided chunks; a collective."""
        for members, moved in self._scattered:
            shards = moved.to_shards([self._chunks[i] for i in members])
            for i, shard in zip(members, shards, strict=True):
                local_tensor(self._parameters[i].detach()).copy_(shard)

    def whole(self, position: int, part: Tensor) -> Tensor:
        """A tensor over all chunks of a parameter, of which each rank has its part.

        Args:
            position: the parameter's number.
            part: `[*chunks, ...]` as `layouts[position].lead` has the chunks; any dtype.

        Returns:
            `[*chunks of the whole, ...]`: a DTensor for a shard that lies where the parameter does,
            else plain and the same on every rank. A collective for divided chunks.
        """
        p, lead = self._parameters[position], self._wholes[position].lead
        if not isinstance(p, DTensor):
            return part
        shape = torch.Size((*lead, *part.shape[len(self.layouts[position].lead) :]))
        if position in self._where:
            moved, number = self._where[position]
            return moved.gather(number, part).view(shape)
        return placed_like(part, p, shape)

    def own(self, position: int, whole: Tensor) -> Tensor:
        """This rank's part of a plain tensor over all chunks of a parameter; see `whole`."""
        p = self._parameters[position]
        if not isinstance(p, DTensor):
            return whole
        if position in self._where:
            moved, number = self._where[position]
            rest = whole.shape[len(self._wholes[position].lead) :]
            return moved.own(number, whole.reshape(-1, *rest))
        # src_data_rank=None: every rank holds the same whole tensor.
        shard = distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None)
        return shard.to_local()

    def whole_results(self, results: Sequence[DistroResult]) -> list[DistroResult]:
        """Results over whole parameters from each rank's own; a collective."""
        return [
            replace(
                r,
                sparse_idx=full_tensor(self.whole(i, r.sparse_idx)),
                sparse_val=full_tensor(self.whole(i, r.sparse_val)),
                xshape=whole.xshape,
            )
            for i, (r, whole) in enumerate(zip(results, self._wholes, strict=True))
        ]

    def own_results(self, results: Sequence[DistroResult]) -> list[DistroResult]:
        """This rank's part of results over whole parameters.

        Raises:
            ValueError: they are not over these parameters.
        """
        if not any(isinstance(p, DTensor) for p in self._parameters):
            return list(results)
        check_form(results, self._wholes, "whole results")
        return [
            replace(
                r,
                sparse_idx=self.own(i, r.sparse_idx).view(part.index_shape),
                sparse_val=self.own(i, r.sparse_val).view(part.value_shape),
                xshape=part.xshape,
            )
            for i, (r, part) in enumerate(zip(results, self.layouts, strict=True))
        ]
