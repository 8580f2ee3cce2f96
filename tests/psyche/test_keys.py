"""What a sidecar reads from the store of Psyche's core."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch

from psyche_fast.psyche.store import PsycheStore
from psyche_fast.start.network import listen
from psyche_fast.start.store import StoreClient, host_store

SECONDS = timedelta(seconds=10)


@pytest.mark.parametrize(
    ("dp", "tp", "said"),
    [
        ("0", "1", "'dp': wanted a positive number, got '0'"),
        ("1", "two", "'tp': wanted a positive number, got 'two'"),
    ],
)
def test_parallelism_and_what_is_none(dp: str, tp: str, said: str) -> None:
    sock = listen("127.0.0.1", 0)
    port = sock.getsockname()[1]
    core = host_store(sock, 2, SECONDS)
    store = PsycheStore(StoreClient("127.0.0.1", port, 2, SECONDS), torch.device("cpu"))
    core.set("dp", "2")
    core.set("tp", "3")
    assert store.receive_parallelism() == (2, 3)
    core.set("dp", dp)
    core.set("tp", tp)
    with pytest.raises(ValueError, match=said):
        store.receive_parallelism()
