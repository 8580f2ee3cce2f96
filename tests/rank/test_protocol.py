"""What our own core says to its ranks: runs, operations, and each replica's rows once."""

from __future__ import annotations

import socket
from datetime import timedelta
from pathlib import Path

import msgspec
import pytest
import torch
import torch.distributed as dist

from psyche_fast.batch import IGNORE, Batch
from psyche_fast.config import RunConfig
from psyche_fast.models.source import FilesSource
from psyche_fast.rank import protocol
from psyche_fast.rank.protocol import (
    Exit,
    Inbox,
    Save,
    Sender,
    Train,
    hand_on,
    read_operation,
    receive_run,
)
from psyche_fast.rank.topology import Topology
from psyche_fast.start.network import listen
from psyche_fast.start.store import StoreClient, host_store
from tests.groups import run_ranks

SECONDS = timedelta(seconds=10)


def pair(replicas: int = 2) -> tuple[Sender, StoreClient, dist.TCPStore]:
    sock = listen("127.0.0.1", 0)
    port = sock.getsockname()[1]
    store = host_store(sock, 2, SECONDS)
    return Sender(store, replicas), StoreClient("127.0.0.1", port, 2, SECONDS), store


def test_a_run_travels_as_it_is_and_paths_from_home(tmp_path: Path) -> None:
    sender, client, store = pair()
    config = RunConfig.of(replicas=4, distro=True, param_dtype="float32", seed=5, timeout=77)
    home = tmp_path / "home"
    source = FilesSource((home / "m" / "config.json", tmp_path / "other.json"))
    sender.publish_run(config, source, home)
    found, files = receive_run(client)
    assert found == config
    assert client.seconds == 77
    assert files.files == (Path.home() / "m" / "config.json", tmp_path / "other.json")
    for old, new, said in (
        (b'"seed":5', b'"seeds":5', "unknown field `seeds`"),
        (b'"total_batch":256', b'"total_batch":0', r"Expected `int` >= 1.*run.total_batch"),
    ):
        text = store.get("psyche_fast")
        store.set("psyche_fast", text.replace(old, new))
        with pytest.raises(ValueError, match=said):
            receive_run(client)
        store.set("psyche_fast", text)


@pytest.mark.parametrize(("largest", "width"), [(65_535, 2), (65_536, 4), (2**31 - 1, 4)])
def test_tokens_travel_in_their_own_width(largest: int, width: int) -> None:
    ids = torch.tensor([[0, 1, largest], [3, 4, 5]])
    operation = Train.of(7, Batch(ids))
    assert len(operation.input_ids) == width * ids.numel()
    packed = msgspec.msgpack.encode(operation)
    assert len(packed) < width * ids.numel() + 40, "and little else"
    again = msgspec.msgpack.decode(packed, type=protocol.Operation)
    assert again == operation
    assert torch.equal(again.batch().input_ids, ids)
    assert again.batch().labels is None


def test_labels_positions_and_documents_come_back() -> None:
    ids = torch.arange(24).view(4, 6)
    labels = torch.where(ids % 5 == 0, IGNORE, ids)
    lengths = [[6], [2, 4], [1, 5], [3, 3]]
    batch = Batch(ids, labels, torch.arange(6).repeat(4, 1), lengths)
    found = Train.of(1, batch).batch()
    assert torch.equal(found.input_ids, ids)
    assert found.labels is not None
    assert torch.equal(found.labels, labels)
    assert found.position_ids is not None
    assert torch.equal(found.position_ids, torch.arange(6).repeat(4, 1))
    assert found.sequence_lengths == lengths


def inbox(client: StoreClient, replica: int = 1) -> Inbox:
    return Inbox(client, Topology(replicas=2, replica=replica))


def test_operations_are_read_ahead_and_each_replica_is_sent_its_rows() -> None:
    sender, client, _ = pair(replicas=3)
    whole = Batch(torch.arange(36).view(6, 6))
    shares = {replica: Train.of(4, whole.share(replica, 3)) for replica in (1, 2)}
    sender.publish(Save(3))
    number, size = sender.publish_parts(shares)
    assert number == 1
    assert size == len(msgspec.msgpack.encode(shares[1]))
    sender.publish(Exit())  # nobody has read anything yet
    box = inbox(client, replica=2)
    assert box.next() == Save(3)
    operation = box.next()
    assert isinstance(operation, Train)
    assert torch.equal(operation.batch().input_ids, whole.input_ids[4:])
    assert box.next() == Exit()


def test_a_batch_larger_than_the_store_takes() -> None:
    sender, client, store = pair()
    generator = torch.Generator().manual_seed(0)
    batch = Batch(torch.randint(2**31, (300, 10_000), generator=generator))  # 12 MB
    sender.publish_parts({1: Train.of(1, batch)})
    box = inbox(client)
    operation = box.next()
    assert isinstance(operation, Train)
    assert torch.equal(operation.batch().input_ids, batch.input_ids)
    before = store.num_keys()
    sender.forget(0)
    assert store.num_keys() == before - 3
    sender.publish(Exit())  # ends the reading thread


def test_the_store_holds_a_bounded_number_of_keys() -> None:
    sender, client, store = pair()
    box = inbox(client)
    held = []
    for step in range(1, 200):
        number, _ = sender.publish_parts({1: Train.of(step, Batch(torch.full((2, 4), step)))})
        operation = box.next()
        assert isinstance(operation, Train)
        assert operation.step == step
        sender.forget(number - 1)
        held.append(store.num_keys())
    assert max(held) == held[2]
    sender.publish(Exit())  # ends the reading thread


def test_an_error_of_the_reading_thread_reaches_who_receives() -> None:
    _, client, store = pair()
    store.set("psyche_fast/0/1", b"1\n\x81\xa1x\x01")  # type: ignore[arg-type]  # the stub knows str only
    with pytest.raises(msgspec.ValidationError, match="Expected `array`"):
        inbox(client).next()


def test_a_batch_whose_bytes_are_not_of_its_shape_is_refused() -> None:
    good = msgspec.msgpack.encode(Train.of(1, Batch(torch.arange(48).view(4, 12))))
    operation = read_operation(b"1\n" + good, lambda piece: b"")
    assert isinstance(operation, Train)
    assert operation.shape == (4, 12)
    fields = msgspec.msgpack.decode(good)
    for at, other in ((2, [4, 11]), (2, [0, 12]), (2, [-4, -12]), (3, fields[3][:-1]), (4, b"1")):
        bad = [*fields[:at], other, *fields[at + 1 :]]
        with pytest.raises(ValueError, match="bytes for shape"):
            read_operation(b"1\n" + msgspec.msgpack.encode(bad), lambda piece: b"")
    for pieces in (b"0", b"-1", b"1025", b"", b"x", b"9999999999"):
        with pytest.raises(ValueError, match="pieces"):
            read_operation(pieces + b"\n" + good, lambda piece: b"")


def _handed_on(rank: int, port: int) -> tuple[list[bytes], int]:
    """What each rank of two replicas of two ranks is told, and what it reads from the store."""
    topology = Topology.build(2, 1, torch.device("cpu"), host=True)
    whole = Batch(torch.arange(48).view(4, 12))
    shares = [Train.of(1, whole.share(replica, 2)) for replica in range(2)]
    if rank == 0:
        store = host_store(listen("127.0.0.1", port), 4, SECONDS)
        sender = Sender(store, 2)
        sender.publish_parts({1: shares[1]})
        sender.publish(Exit())
        said = [hand_on(operation, topology) for operation in (shares[0], Exit())]
        dist.barrier()
        return [msgspec.msgpack.encode(operation) for operation in said], 0
    client = StoreClient("127.0.0.1", port, 4, SECONDS)
    read = []
    wait_for = client.wait_for
    client.wait_for = lambda store, key: (read.append(key), wait_for(store, key))[1]  # type: ignore[method-assign]
    box = Inbox(client, topology)
    said = [box.next() for _ in range(2)]
    dist.barrier()
    return [msgspec.msgpack.encode(operation) for operation in said], len(read)


@pytest.mark.processes
def test_a_batch_is_read_once_per_replica_and_handed_on_there() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    found = run_ranks(_handed_on, 4, port)
    whole = Batch(torch.arange(48).view(4, 12))
    for rank, (said, read) in enumerate(found):
        mine = Train.of(1, whole.share(rank // 2, 2))
        assert said == [msgspec.msgpack.encode(mine), msgspec.msgpack.encode(Exit())]
        assert read == (2 if rank == 2 else 0)
