"""Connections to other machines are held to a link's rate, and no others."""

from __future__ import annotations

import os
import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from psyche_fast.config import RunConfig
from psyche_fast.links import Link
from psyche_fast.rank import pace
from psyche_fast.rank.topology import Topology

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux holds connections to a rate")
UNLIMITED = (1 << 64) - 1


def rate(connection: socket.socket) -> int:
    """Bytes per second that a connection may send."""
    raw = connection.getsockopt(socket.SOL_SOCKET, 47, 8)
    return int(struct.unpack("L", raw)[0])


@pytest.fixture
def connected() -> Iterator[tuple[socket.socket, socket.socket]]:
    with (
        socket.create_server(("127.0.0.1", 0)) as door,
        # Another address of this machine, as another machine has another one.
        socket.create_connection(door.getsockname(), source_address=("127.0.0.2", 0)) as one,
        closing(door.accept()[0]) as other,
    ):
        yield one, other


@pytest.mark.parametrize(
    ("method", "replicas", "share"),
    [("sparseloco", 3, 1.0), ("diloco", 2, 1.0), ("diloco", 5, 0.25), (None, 2, 1.0)],
)
def test_connections_to_other_machines_are_held(
    connected: tuple[socket.socket, socket.socket], method: str | None, replicas: int, share: float
) -> None:
    assert rate(connected[0]) == UNLIMITED
    options = {"method": method} if method else {"distro": True}
    run = RunConfig.of(replicas=replicas, param_dtype="float32", **options)
    place = Topology(replicas=replicas)
    assert pace.pace(Link(10e6, 100e6, 0.1), run, place) >= 2
    for connection in connected:
        assert rate(connection) == int(0.95 * 10e6 / 8 * share)
    connected[0].sendall(b"goes")
    assert connected[1].recv(4) == b"goes"


def test_whatever_else_is_open_is_left_alone(tmp_path: Path) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as door,
        socket.create_connection(door.getsockname()) as within,  # from an address to itself
        socket.socketpair()[0] as pair,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams,
        (tmp_path / "file").open("w") as file,
    ):
        for one in (door, within, pair, datagrams, file):
            assert not pace.hold(one.fileno(), 1000)
        assert rate(within) == UNLIMITED
        gone = os.dup(file.fileno())
    os.close(gone)
    assert not pace.hold(gone, 1000)
