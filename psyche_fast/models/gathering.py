"""Whole tensors on one rank, from the parts that the ranks of a replica hold.

Tensors travel side by side in buckets, one gather each, however many there are; one that is larger
than a bucket travels in several. Only the rank that wants them holds more than its own parts, on
its device no more than `GATHERED_BYTES` of the others'.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from psyche_fast.sharding import local_tensor, part_of

GATHERED_BYTES = 16 << 20
"""The most that the first rank receives in one gather, from all ranks together. More gains nothing
on gloo, and little on NCCL beside what a checkpoint's files take."""

_ALIGNMENT = 16  # bytes: any dtype may be viewed there


@dataclass(frozen=True)
class _Slot:
    """A tensor's place in a bucket, as large as the largest part of it that a rank holds."""

    tensor: Tensor
    start: int
    size: int


def gather_whole(tensors: Sequence[Tensor], group: dist.ProcessGroup | None) -> Iterator[Tensor]:
    """Tensors one after the other, whole, on the group's first rank.

    Args:
        tensors: distributed tensors over (parts of) the group, and plain ones, which every rank
            holds whole; the same on all ranks of the group, all of which go through all of it.
        group: None for one rank.

    Yields:
        a new CPU tensor on the first rank, an empty one on the meta device elsewhere.
    """
    root = group is None or dist.get_rank(group) == 0
    limit = GATHERED_BYTES if group is None else GATHERED_BYTES // dist.get_world_size(group)
    limit = max(limit - limit % _ALIGNMENT, _ALIGNMENT)
    parts: list[Tensor] | None
    for bucket in _buckets(tensors, limit):
        parts = None  # before the next ones arrive
        if bucket[-1].size:
            parts = _gather(bucket, limit, group)
        for slot in bucket:
            if not root:
                yield torch.empty(slot.tensor.shape, dtype=slot.tensor.dtype, device="meta")
            elif not isinstance(slot.tensor, DTensor):
                yield slot.tensor.detach().to("cpu", copy=True)
            else:
                assert group is not None and parts is not None
                yield _assemble(slot, slot.tensor, parts, dist.get_process_group_ranks(group))


def _buckets(tensors: Sequence[Tensor], limit: int) -> Iterator[list[_Slot]]:
    """Buckets of at most `limit` bytes or one tensor; plain tensors have one of their own."""
    bucket: list[_Slot] = []
    for tensor in tensors:
        if not isinstance(tensor, DTensor):
            if bucket:
                yield bucket
            yield [_Slot(tensor, 0, 0)]
            bucket = []
            continue
        size = math.prod(r.stop - r.start for r in part_of(tensor, [0] * tensor.device_mesh.ndim))
        size *= tensor.element_size()
        size += -size % _ALIGNMENT
        end = bucket[-1].start + bucket[-1].size if bucket else 0
        if bucket and end + size > limit:
            yield bucket
            bucket, end = [], 0
        bucket.append(_Slot(tensor, end, size))
    if bucket:
        yield bucket


def _gather(
    bucket: Sequence[_Slot], limit: int, group: dist.ProcessGroup | None
) -> list[Tensor] | None:
    """All ranks' bytes of a bucket, on the CPU, in the order of ranks; None but on the first."""
    assert group is not None, "one rank has no distributed tensors"
    ranks, root = dist.get_world_size(group), dist.get_rank(group) == 0
    size = bucket[-1].start + bucket[-1].size
    whole = [torch.empty(size, dtype=torch.uint8) for _ in range(ranks)] if root else None
    for start in range(0, size, limit):
        sent = _bytes(bucket, start, min(start + limit, size))
        received = None if whole is None else [torch.empty_like(sent) for _ in whole]
        dist.gather(sent, received, group=group, group_dst=0)
        if whole is not None and received is not None:
            for into, part in zip(whole, received, strict=True):
                into[start : start + limit] = part
    return whole


def _bytes(bucket: Sequence[_Slot], start: int, stop: int) -> Tensor:
    """This rank's bytes `start .. stop` of a bucket, on its device."""
    found = torch.zeros(stop - start, dtype=torch.uint8, device=bucket[-1].tensor.device)
    for slot in bucket:
        local = local_tensor(slot.tensor).detach().contiguous().view(-1).view(torch.uint8)
        first, last = max(start, slot.start), min(stop, slot.start + local.numel())
        if first < last:
            found[first - start : last - start] = local[first - slot.start : last - slot.start]
    return found


def _assemble(
    slot: _Slot, tensor: DTensor, parts: Sequence[Tensor], ranks: Sequence[int]
) -> Tensor:
    mesh = tensor.device_mesh
    whole = torch.empty(tensor.shape, dtype=tensor.dtype)
    for coordinate in itertools.product(*(range(size) for size in mesh.shape)):
        copies = zip(coordinate, tensor.placements, strict=True)
        if any(at and placement.is_replicate() for at, placement in copies):
            continue
        ranges = part_of(tensor, coordinate)
        shape = [r.stop - r.start for r in ranges]
        size = math.prod(shape) * tensor.element_size()
        part = parts[ranks.index(int(mesh.mesh[coordinate]))][slot.start : slot.start + size]
        whole[ranges] = part.view(tensor.dtype).view(shape)
    return whole
