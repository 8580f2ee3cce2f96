"""Whole tensors from parts, on meshes of one and of two dimensions."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from psyche_fast.models import gathering
from tests.groups import run_ranks


def wholes() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [
        torch.randn(16, 6),
        torch.randn(7, 3).bfloat16(),  # halves of 4 and 3 rows
        torch.arange(1, 2),  # nothing for the second rank
        torch.randn(3, 8, 5),
        torch.randn(4, 4),
        torch.randn(5),
        torch.randn(300),
    ]


def gather(rank: int, most: int) -> tuple[list[torch.Tensor], list[int]]:
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shard", "tensor"))
    row = grid["shard"]  # another pair of ranks for each slice
    tensors = wholes()
    parts = [
        distribute_tensor(tensors[0], grid, [Shard(0), Shard(1)]),
        distribute_tensor(tensors[1], row, [Shard(0)]),
        distribute_tensor(tensors[2], row, [Shard(0)]),
        distribute_tensor(tensors[3], grid, [Replicate(), Shard(1)]),
        tensors[4],
        distribute_tensor(tensors[5], grid, [Shard(0), Replicate()]),
        distribute_tensor(tensors[6], grid, [Replicate(), Replicate()]),
    ]
    with (
        mock.patch.object(gathering, "GATHERED_BYTES", most),
        mock.patch.object(dist, "gather", wraps=dist.gather) as collective,
    ):
        found = list(gathering.gather_whole(parts, dist.group.WORLD))
    sizes = [sum(t.nbytes for t in call.args[1] or []) for call in collective.call_args_list]
    return [t if rank == 0 else t.to("meta") for t in found], sizes


@pytest.mark.processes
def test_the_first_rank_gets_them_whole_in_a_few_gathers_of_bounded_size() -> None:
    # Of 800 bytes each rank sends 192: 144 of the first three tensors, 240 of the fourth in two, 16
    # of the sixth (the fifth is plain), 1200 of the last in seven.
    for most, gathers in ((1 << 20, 2), (4096, 4), (800, 11)):
        found = run_ranks(gather, 4, most)
        for whole, expected in zip(found[0][0], wholes(), strict=True):
            assert whole.device.type == "cpu"
            assert torch.equal(whole, expected)
            assert whole.dtype == expected.dtype
        for tensors, sizes in found:
            assert len(sizes) == gathers
            assert max(sizes) <= most
            assert [t.shape for t in tensors] == [t.shape for t in wholes()]
        assert all(t.is_meta for tensors, _ in found[1:] for t in tensors)


def test_one_rank_copies() -> None:
    for whole, expected in zip(gathering.gather_whole(wholes(), None), wholes(), strict=True):
        assert torch.equal(whole, expected)
