from __future__ import annotations

import socket
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch

from psyche_fast.batch import Batch
from psyche_fast.models.source import FilesSource
from psyche_fast.psyche.messages import Exit, Extract, Settings, Train
from psyche_fast.psyche.store import CoreStore, SidecarStore, listen
from psyche_fast.psyche.tensors import pack_batch, unpack_batch
from psyche_fast.start.devices import Processor

SECONDS = timedelta(seconds=10)
CPU = torch.device("cpu")


def pair() -> tuple[CoreStore, SidecarStore]:
    sock = listen("127.0.0.1", 0)
    port = sock.getsockname()[1]
    return CoreStore(sock, 2, SECONDS), SidecarStore("127.0.0.1", port, 2, SECONDS)


def test_the_store_listens_on_loopback_alone() -> None:
    sock = listen("127.0.0.1", 0)
    port = sock.getsockname()[1]
    store = CoreStore(sock, 2, SECONDS)
    listening = {
        c.laddr.ip
        for c in psutil.Process().net_connections()
        if c.status == psutil.CONN_LISTEN and c.laddr.port == port
    }
    assert listening == {"127.0.0.1"}
    assert store.store.port == port


def test_a_port_in_use_is_a_clear_error() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"--port {port}: cannot listen there"):
            listen("127.0.0.1", port)


def test_sidecars_say_what_they_compute_on() -> None:
    core, sidecar = pair()
    gpu = Processor("cuda", "NVIDIA H200", "sm_90")
    sidecar.introduce(1, gpu)
    assert core.processors() == [gpu]
    alone = CoreStore(listen("127.0.0.1", 0), 1, SECONDS)
    assert alone.processors() == []


def test_ranks_that_do_not_come_are_named() -> None:
    core = CoreStore(listen("127.0.0.1", 0), 4, timedelta(seconds=0.1))
    core.store.set("processor/2", "{}")
    with pytest.raises(RuntimeError, match="timed out waiting for the start of rank 1, 3"):
        core.processors()


def test_parallelism_without_our_keys_is_psyches() -> None:
    core, sidecar = pair()
    core.store.set("dp", "2")
    core.store.set("tp", "3")
    assert sidecar.receive_parallelism() == (2, 3, Settings())


def test_our_keys_and_home(tmp_path: Path) -> None:
    core, sidecar = pair()
    settings = Settings(replicas=4, param_dtype="float32", check_every=7)
    source = FilesSource((tmp_path / "home" / "m" / "config.json",))
    core.publish_model("HfAuto", source, 1, 2, settings, str(tmp_path / "home"))
    assert core.store.get("files") == b'["~/m/config.json"]'
    assert sidecar.receive_parallelism() == (1, 2, settings)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("dp", "0", "'dp': wanted a positive number, got '0'"),
        ("tp", "two", "'tp': wanted a positive number"),
        ("psyche_fast_settings", '{"tempo": 1}', "unknown field `tempo`"),
        ("replicas", "-1", "'replicas'"),
    ],
)
def test_malformed_keys(key: str, value: str, said: str) -> None:
    core, sidecar = pair()
    for name, default in (("dp", "1"), ("tp", "1"), (key, value)):
        core.store.set(name, default)
    with pytest.raises(ValueError, match=said):
        sidecar.receive_parallelism()


def test_nobody_at_the_address() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    with pytest.raises(ValueError, match="no store answers"):
        SidecarStore("127.0.0.1", port, 2, timedelta(seconds=1))


def train(batch: Batch, step: int = 1) -> Train:
    return Train(
        step=step, zero_optim=False, batch_id=(0, 7),
        batch_shape=(batch.rows, batch.input_ids.shape[1]),
        batch_has_labels=batch.labels is not None,
        batch_has_position_ids=batch.position_ids is not None,
        batch_sequence_lengths=batch.sequence_lengths, optimize=True,
    )  # fmt: skip


def test_operations_are_read_ahead_and_each_replica_is_sent_its_rows() -> None:
    core, sidecar = pair()
    core.readers = [0, 1]
    ids = torch.arange(24).view(4, 6)
    labels = torch.where(ids % 5 == 0, -100, ids)
    whole = Batch(ids, labels, sequence_lengths=[[6], [2, 4], [1, 5], [3, 3]])
    shares = [whole.share(replica, 2) for replica in core.readers]
    core.publish(Extract())
    core.publish_parts({r: (train(share), pack_batch(share)) for r, share in enumerate(shares)})
    core.publish(Exit())  # nobody has read anything yet
    sidecar.read_ahead(1)
    assert sidecar.receive(CPU) == (Extract(), b"")
    operation, packed = sidecar.receive(CPU)
    assert isinstance(operation, Train)
    assert operation.optimize
    found = unpack_batch(operation, packed, CPU)
    assert torch.equal(found.input_ids, ids[2:])
    assert found.labels is not None
    assert torch.equal(found.labels, labels[2:])
    assert found.position_ids is None
    assert found.sequence_lengths == [[1, 5], [3, 3]]
    assert sidecar.receive(CPU) == (Exit(), b"")
    with pytest.raises(ValueError, match="train: wanted a batch of 96 bytes, got 95"):
        unpack_batch(operation, packed[:-1], CPU)


def test_a_batch_larger_than_the_store_takes() -> None:
    core, sidecar = pair()
    core.readers = [0]
    generator = torch.Generator().manual_seed(0)
    batch = Batch(torch.randint(2**31, (300, 10_000), generator=generator))  # 12 MB
    core.publish_parts({0: (train(batch), pack_batch(batch))})
    sidecar.read_ahead(0)
    operation, packed = sidecar.receive(CPU)
    assert isinstance(operation, Train)
    assert torch.equal(unpack_batch(operation, packed, CPU).input_ids, batch.input_ids)
    assert core.store.num_keys() > 1
    before = core.store.num_keys()
    core.forget(0)
    assert core.store.num_keys() == before - 3
    core.publish(Exit())  # ends the reading thread


def test_the_store_holds_a_bounded_number_of_keys() -> None:
    core, sidecar = pair()
    core.readers = [0]
    sidecar.read_ahead(0)
    held = []
    for step in range(1, 200):
        batch = Batch(torch.full((2, 4), step))
        number = core.publish_parts({0: (train(batch, step), pack_batch(batch))})
        operation, _ = sidecar.receive(CPU)
        assert isinstance(operation, Train)
        assert operation.step == step
        core.forget(number - 1)
        held.append(core.store.num_keys())
    assert max(held) == held[2]
    core.publish(Exit())  # ends the reading thread


def test_an_error_of_the_reading_thread_reaches_who_receives() -> None:
    core, sidecar = pair()
    core.store.set("0/0", '1\n{"operation": "dance"}\n')
    sidecar.read_ahead(0)
    with pytest.raises(ValueError, match="operation 0: unknown operation 'dance'"):
        sidecar.receive(CPU)
