"""The store that rank 0 hosts, and what ranks say and wait for in it."""

from __future__ import annotations

import socket
import threading
import time
from datetime import timedelta

import psutil
import pytest
import torch.distributed as dist

from psyche_fast.start.devices import Processor
from psyche_fast.start.network import listen
from psyche_fast.start.store import StoreClient, host_store, introduce, processors

SECONDS = timedelta(seconds=10)


def pair() -> tuple[dist.TCPStore, StoreClient]:
    sock = listen("127.0.0.1", 0)
    port = sock.getsockname()[1]
    return host_store(sock, 2, SECONDS), StoreClient("127.0.0.1", port, 2, SECONDS)


def test_the_store_listens_on_loopback_alone() -> None:
    sock = listen("127.0.0.1", 0)
    port = sock.getsockname()[1]
    store = host_store(sock, 2, SECONDS)
    listening = {
        c.laddr.ip
        for c in psutil.Process().net_connections()
        if c.status == psutil.CONN_LISTEN and c.laddr.port == port
    }
    assert listening == {"127.0.0.1"}
    assert store.port == port


def test_a_port_in_use_is_a_clear_error() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"--port {port}: cannot listen there"):
            listen("127.0.0.1", port)


def test_nobody_at_the_address() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    with pytest.raises(ValueError, match="no store answers"):
        StoreClient("127.0.0.1", port, 2, timedelta(seconds=1))


def test_ranks_say_what_they_compute_on() -> None:
    core, client = pair()
    gpu = Processor("cuda", "NVIDIA H200", "sm_90")
    introduce(client.store, 1, gpu)
    assert processors(core, 2, SECONDS) == [gpu]
    assert processors(core, 1, SECONDS) == []


def test_ranks_that_do_not_come_are_named() -> None:
    core, _ = pair()
    core.set("processor/2", "{}")
    with pytest.raises(RuntimeError, match="timed out waiting for the start of rank 1, 3"):
        processors(core, 4, timedelta(seconds=0.1))


@pytest.mark.parametrize("key", ["psyche_fast", "architecture"])
def test_whichever_key_comes_says_which_core_it_is(key: str) -> None:
    core, client = pair()
    found: list[str] = []
    waiting = threading.Thread(
        target=lambda: found.append(client.first_of(("psyche_fast", "architecture")))
    )
    waiting.start()
    time.sleep(0.1)
    assert found == [], "nothing to be known yet"
    core.set(key, "x")
    waiting.join(10)
    assert found == [key]


def test_a_rank_that_is_started_again_too_soon_does_not_join_what_its_past_left_behind() -> None:
    _, client = pair()
    here = Processor("cpu", "x86_64", "avx2")
    introduce(client.store, 1, here)
    with pytest.raises(RuntimeError, match="rank 1 is there already, or has been lost"):
        introduce(client.store, 1, here)
    introduce(client.store, 1, here, "2")
