"""Distributed tensors (DTensor, as FSDP2 and tensor parallelism make them): which part is whose.

All that the project knows about placements is in this module, which does not know what the tensors
are for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

Ranges = tuple[slice, ...]
"""A part of a tensor: one range per dimension."""


def local_tensor(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank holds, sharing its memory; a plain tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_gradient(parameter: Tensor) -> Tensor | None:
    """This rank's part of a parameter's gradient, placed as the parameter is; None for none.

    A collective where the gradient of a distributed parameter is placed otherwise.
    """
    gradient = parameter.grad
    if isinstance(gradient, DTensor):
        assert isinstance(parameter, DTensor)
        if gradient.placements != parameter.placements:
            gradient = gradient.redistribute(placements=parameter.placements)
        gradient = gradient.to_local()
    return gradient


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a DTensor, a collective; a plain tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def placed_like(local: Tensor, like: DTensor, shape: Sequence[int] | None = None) -> DTensor:
    """A DTensor whose part on each rank is `local`, sharing its memory.

    Args:
        local: this rank's part.
        like: has the mesh and the placements.
        shape: of the whole; None for that of `like`.
    """
    shape = torch.Size(like.shape if shape is None else shape)
    stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    return DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=shape, stride=stride
    )


def cuts(tensor: DTensor) -> list[tuple[int, int]]:
    """The cuts that make a tensor's shards, in their order.

    Returns:
        for each cut the tensor's dimension and the mesh's.

    Raises:
        ValueError: a placement that is neither a shard nor a replica.
    """
    ordered = []
    for axis, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            continue
        dim = getattr(placement, "dim", None)
        if dim is None:
            raise ValueError(f"wanted a tensor of shards or replicas, got one placed {placement}")
        # FSDP2 cuts what tensor parallelism has left, although its mesh dimension stands first: it
        # marks that with a strided placement, which therefore comes last.
        strided = getattr(placement, "split_factor", 1) > 1
        ordered.append((strided, dim % tensor.dim(), axis))
    return [(dim, axis) for _, dim, axis in sorted(ordered, key=lambda cut: cut[0])]


def part_of(tensor: DTensor, coordinate: Sequence[int] | None = None) -> Ranges:
    """One rank's part of a distributed tensor.

    Args:
        tensor: cut as FSDP2 and tensor parallelism do.
        coordinate: the rank's coordinate in the tensor's mesh; None for this rank's.
    """
    own = coordinate is None
    if coordinate is None:
        coordinate = tensor.device_mesh.get_coordinate()
        assert coordinate is not None, "this rank is not part of the tensor's mesh"
    ranges = [(0, size) for size in tensor.shape]
    for dim, axis in cuts(tensor):
        start, stop = ranges[dim]
        # As torch.chunk: all but the last ones are of this size.
        size = -(-(stop - start) // tensor.device_mesh.size(axis))
        first = min(start + size * coordinate[axis], stop)
        ranges[dim] = (first, min(first + size, stop))
    if own:
        shape = tuple(stop - start for start, stop in ranges)
        assert shape == tuple(tensor.to_local().shape), "placements are not what FSDP2 and TP make"
    return tuple(slice(start, stop) for start, stop in ranges)


def is_cut_over(tensor: Tensor, group: dist.ProcessGroup) -> bool:
    """Whether the ranks of a mesh dimension's group hold different parts of a tensor."""
    if not isinstance(tensor, DTensor):
        return False
    ranks = dist.get_process_group_ranks(group)
    axes = [axis for _, axis in cuts(tensor)]
    groups = [tensor.device_mesh.get_group(axis) for axis in axes]
    return any(dist.get_process_group_ranks(other) == ranks for other in groups)


def sharing_group(tensor: DTensor) -> dist.ProcessGroup:
    """The ranks that hold different parts of a tensor; a collective where it does not exist yet."""
    mesh = tensor.device_mesh
    axes = [i for i, p in enumerate(tensor.placements) if not p.is_replicate()]
    if len(axes) == 1:
        return mesh.get_group(axes[0])
    assert len(axes) == mesh.ndim, "sharded along some axes of a mesh of more than two"
    return _group_of_mesh(mesh, dist.group.WORLD)


@cache
def _group_of_mesh(mesh: DeviceMesh, world: object) -> dist.ProcessGroup:
    # By the world too: a mesh of a later process group may be equal to one of an earlier.
    ranks = mesh.mesh.flatten().tolist()
    group = dist.new_group(ranks, use_local_synchronization=True)
    assert isinstance(group, dist.ProcessGroup)
    return group


def gathered_numbers(
    numbers: Sequence[int], group: dist.ProcessGroup, device: torch.device
) -> list[list[int]]:
    """As many numbers of each rank of a group; objects would travel pickled. A collective.

    Args:
        numbers: this rank's.
        group: the ranks.
        device: this rank's, where the group is not gloo's.
    """
    on_host = dist.get_backend(group) == "gloo"
    own = torch.tensor(numbers, dtype=torch.int64, device="cpu" if on_host else device)
    received = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(received, own, group=group)
    return [theirs.tolist() for theirs in received]
