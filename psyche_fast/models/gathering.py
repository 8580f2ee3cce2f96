"""Whole tensors on one rank, from the parts that the ranks of a replica hold.

Tensors travel side by side in buckets, one gather each, however many there are. Only the rank that
wants them holds more than its own parts: one bucket from every rank.
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

from psyche_fast.distro.exchange import BUCKET_BYTES
from psyche_fast.sharding import part_of

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
    parts: list[Tensor] | None
    for bucket in _buckets(tensors):
        parts = None  # before the next ones arrive
        if bucket[-1].size:
            parts = _gather(bucket, group)
        for slot in bucket:
            if not root:
                yield torch.empty(slot.tensor.shape, dtype=slot.tensor.dtype, device="meta")
            elif not isinstance(slot.tensor, DTensor):
                yield slot.tensor.detach().to("cpu", copy=True)
            else:
                assert group is not None and parts is not None
                yield _assemble(slot, slot.tensor, parts, dist.get_process_group_ranks(group))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[_Slot]]:
    """Buckets of at most `BUCKET_BYTES` or one tensor; plain tensors have one of their own."""
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
        if bucket and end + size > BUCKET_BYTES[tensor.device.type]:
            yield bucket
            bucket, end = [], 0
        bucket.append(_Slot(tensor, end, size))
    if bucket:
        yield bucket


def _gather(bucket: Sequence[_Slot], group: dist.ProcessGroup | None) -> list[Tensor] | None:
    """All ranks' bytes of a bucket, on the CPU, in the order of ranks; None but on the first."""
    assert group is not None, "one rank has no distributed tensors"
    last = bucket[-1]
    buffer = torch.zeros(last.start + last.size, dtype=torch.uint8, device=last.tensor.device)
    for slot in bucket:
        assert isinstance(slot.tensor, DTensor)
        local = slot.tensor.to_local().detach().contiguous().view(-1).view(torch.uint8)
        buffer[slot.start : slot.start + local.numel()] = local
    ranks = dist.get_process_group_ranks(group)
    received = None
    if dist.get_rank(group) == 0:
        received = [torch.empty_like(buffer) for _ in ranks]
    dist.gather(buffer, received, group=group, group_dst=0)
    return None if received is None else [part.cpu() for part in received]


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
