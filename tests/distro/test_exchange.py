from __future__ import annotations

import math
import time
from collections.abc import Callable
from concurrent.futures import Future
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from psyche_fast.distro import exchange, message, replicas
from psyche_fast.distro.chunks import Layout, ParameterLayout
from psyche_fast.distro.gathers import Gathered, Numbers
from psyche_fast.distro.message import MessageFormat, hash_bits, hash_rows
from psyche_fast.distro.replicas import PendingCheck, ReplicasDiffer
from tests.groups import run_ranks


def _exchange(rank: int) -> torch.Tensor:
    own = torch.arange(1000, dtype=torch.uint8) + rank
    pending = exchange.start(own, dist.group.WORLD)
    other = exchange.start(torch.full((4,), rank), dist.group.WORLD)  # two under way at once
    assert pending.bytes_sent == 1000
    received = pending.wait()
    assert other.wait()[:, 0].tolist() == [0, 1, 2]
    return received.clone()


@pytest.mark.processes
def test_every_peer_receives_all_in_rank_order() -> None:
    expected = torch.stack([torch.arange(1000, dtype=torch.uint8) + rank for rank in range(3)])
    for received in run_ranks(_exchange, 3):
        assert torch.equal(received, expected)


def _exchange_in_buckets(rank: int) -> tuple[torch.Tensor, int]:
    with (
        mock.patch.dict(exchange.BUCKET_BYTES, cpu=4 * 96),
        mock.patch.object(exchange, "_all_gather", wraps=exchange._all_gather) as gathers,
    ):
        received = exchange.start(torch.arange(250) * (rank + 1), dist.group.WORLD).wait()
    return received, gathers.call_count


@pytest.mark.processes
def test_what_is_larger_than_a_bucket_travels_in_several() -> None:
    expected = torch.stack([torch.arange(250) * (rank + 1) for rank in range(2)])
    for received, count in run_ranks(_exchange_in_buckets, 2):
        assert torch.equal(received, expected)
        assert count == 6  # of 48 int64 each, 10 in the last


@pytest.mark.parametrize(("k", "signs"), [(8, True), (32, True), (8, False)])
def test_a_step_of_a_billion_parameters_is_at_most_four_collectives(k: int, signs: bool) -> None:
    # Llama 3.2 1B: 1.24 G parameters in 146 tensors, on the smaller buckets of gloo.
    width, deep, vocabulary, inner = 2048, 16, 128_256, 8192
    layer = {
        "q_proj": (width, width), "k_proj": (512, width), "v_proj": (512, width),
        "o_proj": (width, width), "gate_proj": (inner, width), "up_proj": (inner, width),
        "down_proj": (width, inner), "input_layernorm": (width,), "post_layernorm": (width,),
    }  # fmt: skip
    shapes = {f"{i}.{name}": shape for i in range(deep) for name, shape in layer.items()}
    shapes |= {"embed_tokens": (vocabulary, width), "norm": (width,)}
    assert sum(math.prod(shape) for shape in shapes.values()) > 1e9
    layout = Layout(
        [
            ParameterLayout.of(
                name, shape, torch.bfloat16, torch.device("cpu"),
                compression_chunk=64, compression_topk=k,
            )
            for name, shape in shapes.items()
        ]
    )  # fmt: skip
    size = MessageFormat(layout, ["torch"] * len(layout.plans), signs=signs).size
    buckets = math.ceil(size / exchange.BUCKET_BYTES["cpu"])
    all_to_alls = 2  # where shards' edges cut chunks: tests/distro/test_placement.py counts them
    assert buckets + all_to_alls <= 4


def test_a_lonely_rank_sends_nothing() -> None:
    own = torch.arange(10)
    pending = exchange.start(own, None)
    assert pending.bytes_sent == 0
    assert torch.equal(pending.wait(), own[None])


def test_rows_are_hashed_as_one_by_one() -> None:
    rows = torch.randint(-9, 9, (3, 70_001), generator=torch.Generator().manual_seed(0))
    assert hash_rows(rows).tolist() == [int(hash_bits(row)) for row in rows]
    assert hash_rows(rows[:, :0]).tolist() == [0, 0, 0]


def test_the_hash_is_the_same_whatever_is_added_up_at_once() -> None:
    """As much as suits a device: what a GPU has hashed is checked on the host."""
    rows = torch.randint(-(2**62), 2**62, (2, 1000), generator=torch.Generator().manual_seed(0))
    hashes = []
    for columns in (7, 10, 1000, 1 << 12):  # with a rest, without, of one row, of none
        with mock.patch.object(message, "_COLUMNS", columns):
            hashes.append(hash_rows(rows).tolist())
    assert hashes.count(hashes[0]) == len(hashes)
    odd = [(2 * i + 1) * message._MULTIPLIER for i in range(1000)]
    expected = [sum(a * b for a, b in zip(row, odd, strict=True)) % 2**64 for row in rows.tolist()]
    assert [value % 2**64 for value in hashes[0]] == expected


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


def _check(rank: int) -> list[str]:
    peers = dist.group.WORLD
    assert peers is not None
    tensors = {"a": torch.ones(5), "b": torch.zeros(3, 2), "empty": torch.empty(0)}
    replicas.start({}, peers, 2).finish()
    before = replicas.start(tensors, peers, 3)
    if rank == 1:
        tensors["b"][1, 1] = -0.0  # equal in value, not in bits
    checks = [before, replicas.start(tensors, peers, 4)]
    tensors["b"][1, 1] = 0.0  # what is compared is what there was
    said = []
    for check in checks:
        try:
            check.finish()
        except ReplicasDiffer as error:
            said.append(str(error))
    return said


@pytest.mark.processes
def test_replicas_that_differ_are_found_on_every_rank() -> None:
    for said in run_ranks(_check, 2):
        assert said == ["step 4: replicas are no longer bit-identical in 1 of 3 parameters: b"]


def _late(rank: int) -> bool:
    """Whether a check is begun while the other replica has not come to it yet."""
    peers = dist.new_group()
    assert isinstance(peers, dist.ProcessGroup)
    store = dist.distributed_c10d._get_default_store()
    if rank == 1:
        store.wait(["begun"])
    check = replicas.start({"a": torch.ones(3)}, peers, 1)
    if rank == 0:
        store.set("begun", "")  # waiting in `start` would never come here
    check.finish()
    return True


@pytest.mark.processes
def test_a_check_begins_without_waiting_for_the_others() -> None:
    assert run_ranks(_late, 2) == [True, True]


@pytest.mark.parametrize(
    ("hashes", "ends"),
    [
        ([7, 7, 8], {2}),
        ([7, 8, 8], {0}),
        ([7, 8, 8, 7], {0, 1, 2, 3}),  # nobody knows who is wrong
        ([7, 8], {0, 1}),
        ([7, 8, 9], {0, 1, 2}),
        ([7, 7, 7, 8, 9], {3, 4}),
        ([7, 7], set()),
    ],
)
def test_in_an_elastic_run_those_that_differ_from_most_end(
    hashes: list[int], ends: set[int]
) -> None:
    ranks = [3 * at for at in range(len(hashes))]
    rows = torch.tensor([[h, 5] for h in hashes]).view(torch.uint8)
    gathered: Future[Gathered] = Future()
    gathered.set_result(Gathered(ranks, rows))
    found = {}
    for at, rank in enumerate(ranks):
        try:
            PendingCheck(4, ["a", "b"], Numbers(gathered, rank), "replicas").finish()
        except ReplicasDiffer as error:
            found[at] = str(error)
    assert found.keys() == ends
    assert all(said.endswith("in 1 of 2 parameters: a") for said in found.values())


def asked_and_sent(rank: int) -> list[str]:
    """What a rank of two does for an exchange, in turn."""
    done: list[str] = []
    real = {"irecv": dist.irecv, "isend": dist.isend}

    def noted(name: str) -> Callable[..., object]:
        def call(*arguments: object, **options: object) -> object:
            done.append(name)
            return real[name](*arguments, **options)

        return call

    own = torch.full((5,), rank)
    with mock.patch.multiple(dist, **{name: noted(name) for name in real}):
        pending = exchange.start(own, dist.group.WORLD)
    for _ in range(2):  # by whoever looks at it first, and by whoever applies it
        assert pending.wait().tolist() == [[0] * 5, [1] * 5]
        assert pending.host().tolist() == [[0] * 5, [1] * 5]
    return done


@pytest.mark.processes
def test_two_ranks_ask_before_they_send() -> None:
    """Else what asks for the other's message waits behind the own one: a link goes one way only."""
    assert run_ranks(asked_and_sent, 2) == [["irecv", "isend"]] * 2


def without_the_other(rank: int) -> str:
    if rank == 1:
        return ""  # has gone by the time that the other sends
    time.sleep(2.0)
    pending = exchange.start(torch.arange(5), dist.group.WORLD)
    for _ in range(2):
        with pytest.raises(RuntimeError) as said:
            pending.wait()
    return str(said.value)


@pytest.mark.processes
def test_who_has_gone_is_missed_where_it_is_waited_for() -> None:
    assert "closed" in run_ranks(without_the_other, 2)[0]
