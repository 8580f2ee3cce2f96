from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from psyche_fast.collectives import exchange
from psyche_fast.collectives.identical import ReplicasDiffer, check_identical, hash_bits
from tests.groups import run_ranks


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 1000])
def test_bits_round_trip(count: int) -> None:
    bits = torch.rand(count, generator=torch.Generator().manual_seed(count)) < 0.5
    packed = exchange.pack_bits(bits)
    assert packed.numel() == -(-count // 8)
    assert torch.equal(exchange.unpack_bits(packed, count), bits)


def tensors_of(rank: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return [
        torch.randint(0, 255, (3, 5), dtype=torch.uint8, generator=generator),
        torch.rand(7, generator=generator) < 0.5,
        torch.randn(2, 3, generator=generator),
        torch.randn(5, generator=generator).bfloat16(),
        torch.empty(0),
        torch.randn(1, generator=generator, dtype=torch.float64),
    ]


def _exchange(rank: int) -> list[list[torch.Tensor]]:
    pending = exchange.start(tensors_of(rank), dist.group.WORLD)
    other = exchange.start([torch.full((4,), rank)], dist.group.WORLD)  # two under way at once
    received = pending.wait()
    assert [int(t[0]) for (t,) in other.wait()] == [0, 1, 2]
    return [[t.clone() for t in peer] for peer in received]


def test_every_peer_receives_all_in_rank_order() -> None:
    expected = [tensors_of(rank) for rank in range(3)]
    for received in run_ranks(_exchange, 3):
        for peer, own in zip(received, expected, strict=True):
            for a, b in zip(peer, own, strict=True):
                assert a.dtype == b.dtype
                assert torch.equal(a, b)


def test_a_lonely_rank_sends_nothing() -> None:
    own = tensors_of(0)
    pending = exchange.start(own, None)
    assert pending.bytes_sent == 0
    assert pending.wait() == [own]


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
