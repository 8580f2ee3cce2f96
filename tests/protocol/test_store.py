from __future__ import annotations

import socket
from datetime import timedelta
from pathlib import Path

import psutil
import pytest

from psyche_fast.models.source import FilesSource
from psyche_fast.protocol.messages import Settings
from psyche_fast.protocol.store import CoreStore, SidecarStore, listen

SECONDS = timedelta(seconds=10)


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
