from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from psyche_fast.collectives import exchange
from psyche_fast.collectives.identical import ReplicasDiffer, check_identical, hash_bits, hash_rows
from tests.groups import run_ranks


def _exchange(rank: int) -> torch.Tensor:
    own = torch.arange(1000, dtype=torch.uint8) + rank
    pending = exchange.start(own, dist.group.WORLD)
    other = exchange.start(torch.full((4,), rank), dist.group.WORLD)  # two under way at once
    assert pending.bytes_sent == 1000
    received = pending.wait()
    assert other.wait()[:, 0].tolist() == [0, 1, 2]
    return received.clone()


def test_every_peer_receives_all_in_rank_order() -> None:
    expected = torch.stack([torch.arange(1000, dtype=torch.uint8) + rank for rank in range(3)])
    for received in run_ranks(_exchange, 3):
        assert torch.equal(received, expected)


def test_a_lonely_rank_sends_nothing() -> None:
    own = torch.arange(10)
    pending = exchange.start(own, None)
    assert pending.bytes_sent == 0
    assert torch.equal(pending.wait(), own[None])


def test_rows_are_hashed_as_one_by_one() -> None:
    rows = torch.randint(-9, 9, (3, 70_001), generator=torch.Generator().manual_seed(0))
    assert hash_rows(rows).tolist() == [int(hash_bits(row)) for row in rows]
    assert hash_rows(rows[:, :0]).tolist() == [0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.bool])
def test_hash_sees_every_change(dtype: torch.dtype) -> None:
    x = (torch.randn(70_001, generator=torch.Generator().manual_seed(0)) * 100).to(dtype)
    if dtype == torch.bool:
        x = torch.arange(70_001) % 3 == 0
    own = hash_bits(x)
    assert own == hash_bits(x.clone())
    for at in (0, 12_345, 65_535, 65_536, 70_000):
        changed = x.clone()
        words = changed.view(torch.uint8)
        words[at * x.element_size()] ^= 1
        assert hash_bits(changed) != own, at
    swapped = x.clone()
    at = int((x[1:] != x[:-1]).nonzero()[0])
    swapped[at], swapped[at + 1] = x[at + 1], x[at]
    assert hash_bits(swapped) != own


def _check(rank: int) -> str:
    peers = dist.group.WORLD
    assert peers is not None
    tensors = {"a": torch.ones(5), "b": torch.zeros(3, 2), "empty": torch.empty(0)}
    check_identical(tensors, peers, 3)
    if rank == 1:
        tensors["b"][1, 1] = -0.0  # equal in value, not in bits
    try:
        check_identical(tensors, peers, 4)
    except ReplicasDiffer as error:
        return str(error)
    return ""


def test_replicas_that_differ_are_found_on_every_rank() -> None:
    for message in run_ranks(_check, 2):
        assert message == ("step 4: replicas are no longer bit-identical in 1 of 3 parameters: b")
