"""The door before the store: who knows the secret comes in, nobody else does, and both are told."""

from __future__ import annotations

import hmac
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from psyche_fast.start import knock, relay
from psyche_fast.start.door import Door
from psyche_fast.start.knock import check, read_secret
from psyche_fast.start.network import listen
from psyche_fast.start.relay import Relay
from psyche_fast.start.store import StoreClient, host_store
from tests.processes import wait_until

SECRET = b"s" * 32
SECONDS = timedelta(seconds=5)


class Place:
    """A store behind a door, in this process."""

    def __init__(self, secret: bytes = SECRET, run: str = "run", port: int = 0) -> None:
        inner = listen("127.0.0.1", 0)
        self.inside = inner.getsockname()[1]
        self.store = host_store(inner, 2, SECONDS)
        sock = listen("127.0.0.1", port)
        self.port = sock.getsockname()[1]
        self.door = Door(sock, self.inside, secret, run, 60)

    def client(self, rank: int = 1, secret: bytes = SECRET) -> StoreClient:
        return StoreClient("127.0.0.1", self.port, 2, SECONDS, rank=rank, secret=secret)

    def call(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), 5)


@pytest.fixture
def place() -> Iterator[Place]:
    place = Place()
    yield place
    place.door.close()


def answer(place: Place, secret: bytes = SECRET, rank: int = 1, life: bytes = b"l" * 16) -> bytes:
    """What the door answers a knock that is made by hand."""
    with place.call() as sock:
        sock.sendall(knock_for(sock.recv(56), secret, rank, life))
        return sock.recv(33)


def knock_for(greeting: bytes, secret: bytes = SECRET, rank: int = 1, life: bytes = b"l" * 16):
    said = life + rank.to_bytes(4, "little") + os.urandom(32)
    return said + hmac.digest(secret, b"knock" + greeting + said, "sha256")


def test_those_who_know_the_secret_have_the_store(place: Place) -> None:
    client = place.client()
    place.store.set("from the core", "1")
    assert client.get("from the core") == "1"
    client.store.set("from the rank", "x" * (5 << 20))
    assert len(place.store.get("from the rank")) == 5 << 20
    second = client.clone()
    second.set("a clone's", "2")
    assert place.store.get("a clone's") == b"2"
    assert place.door.refused == 0


def garbage(place: Place) -> None:
    with place.call() as sock:
        sock.recv(56)
        sock.sendall(os.urandom(84))
        assert sock.recv(1) == b"", "it answers nothing"


def silence(place: Place) -> None:
    with place.call() as sock:
        sock.recv(56)
        assert sock.recv(1) == b""


def half_a_knock(place: Place) -> None:
    with place.call() as sock:
        greeting = sock.recv(56)
        sock.sendall(knock_for(greeting)[:40])
        sock.shutdown(socket.SHUT_WR)
        assert sock.recv(1) == b""


def wrong_secret(place: Place) -> None:
    assert answer(place, b"t" * 32) == b""


def another_rank_in_the_mac(place: Place) -> None:
    with place.call() as sock:
        said = bytearray(knock_for(sock.recv(56)))
        said[16] ^= 3
        sock.sendall(said)
        assert sock.recv(1) == b""


def a_knock_again(place: Place) -> None:
    """What was heard on the way to this door, word for word, a second time."""
    with place.call() as sock:
        heard = knock_for(sock.recv(56))
        sock.sendall(heard)
        assert len(sock.recv(33)) == 33
    with place.call() as sock:
        sock.recv(56)
        sock.sendall(heard)
        assert sock.recv(1) == b""


def torchs_client(place: Place) -> None:
    with pytest.raises(dist.DistError):
        dist.TCPStore("127.0.0.1", place.port, 2, False, timedelta(seconds=1))


@pytest.mark.parametrize(
    "stranger",
    [garbage, silence, half_a_knock, wrong_secret, another_rank_in_the_mac, a_knock_again,
     torchs_client],
)  # fmt: skip
def test_strangers_are_refused_counted_and_logged(
    place: Place,
    stranger: Callable[[Place], None],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(knock, "PAUSE", 0.2)
    place.store.set("files", "mine")
    with caplog.at_level(logging.WARNING):
        stranger(place)
        wait_until(lambda: place.door.refused > 0, 5)
    assert "the door: knock 1 from 127.0.0.1 is refused: " in caplog.text
    assert place.store.get("files") == b"mine"
    # An honest rank of that address has to wait for a moment at most.
    client = place.client()
    assert client.get("files") == "mine"


def test_a_wrong_secret_is_one_line_on_the_ranks_side(
    place: Place, capfd: pytest.CaptureFixture[str]
) -> None:
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"does not let rank 1 in: is --secret-file the same"):
        place.client(secret=b"t" * 32)
    assert time.monotonic() - began < 2
    assert capfd.readouterr().err == "", "torch was not asked"


def test_who_does_not_know_the_secret_is_not_believed() -> None:
    """Somebody who listens in the core's place and takes any knock."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def take() -> None:
            sock, _ = listening.accept()
            with sock:
                sock.sendall(b"pfdoor\x01\n" + bytes(48))
                sock.recv(84)
                sock.sendall(b"\0" + bytes(32))
                sock.recv(1)

        threading.Thread(target=take, daemon=True).start()
        with pytest.raises(ValueError, match="does not know the secret of --secret-file"):
            Relay("127.0.0.1", listening.getsockname()[1], SECRET, 1, 5.0)


def test_a_store_without_a_door_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    inner = listen("127.0.0.1", 0)
    port = inner.getsockname()[1]
    store = host_store(inner, 2, SECONDS)
    monkeypatch.setattr(relay._greeting, "__defaults__", (0.3,))
    with pytest.raises(ValueError, match="--secret-file: no core that has one listens at"):
        StoreClient("127.0.0.1", port, 2, SECONDS, rank=1, secret=SECRET)
    assert store.num_keys() >= 0


def test_a_door_is_named_to_who_has_no_secret(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(knock, "is_own_machine", lambda host: False)
    with pytest.raises(ValueError, match="lets nobody in without its secret: give --secret-file"):
        StoreClient("127.0.0.1", place.port, 2, SECONDS)


def test_a_rank_is_there_once_and_comes_back_after_its_death(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = place.call()
    first.sendall(knock_for(first.recv(56)))
    assert first.recv(33)[:1] == b"\0"
    assert answer(place)[:1] == b"\0", "connections of one life are as many as it likes"
    assert answer(place, rank=2, life=b"m" * 16)[:1] == b"\0"
    assert answer(place, life=b"m" * 16)[:1] == b"\1", "another process of that rank"
    assert place.door.refused == 1
    monkeypatch.setattr(relay, "_TAKEN_SECONDS", 0.3)
    with pytest.raises(ValueError, match=r"rank 1 is there already: does another process have it"):
        Relay("127.0.0.1", place.port, SECRET, 1, 5.0)
    monkeypatch.undo()
    threading.Timer(0.5, first.close).start()  # which a process's end does
    assert place.client().store.add("n", 1) == 1


def test_a_rank_does_not_go_over_to_another_run(caplog: pytest.LogCaptureFixture) -> None:
    place = Place()
    relay = Relay("127.0.0.1", place.port, SECRET, 1, 5.0)
    place.door.close()
    other = Place(run="another", port=place.port)
    try:
        with socket.create_connection(("127.0.0.1", relay.local), 5) as first:  # it was there
            assert first.recv(1) == b""
        with socket.create_connection(("127.0.0.1", relay.local), 5) as second:
            assert second.recv(1) == b""
        assert "another run listens at" in caplog.text
    finally:
        other.door.close()


def test_knocks_are_limited_in_number_and_rate(place: Place) -> None:
    before = threading.active_count()
    waiting = [place.call() for _ in range(64)]
    wait_until(lambda: place.door.refused == 64 - 16, 1)
    assert threading.active_count() <= before + 16, "of one address at most 16 at a time"
    wait_until(lambda: place.door.refused == 64, 5)  # within 2 s
    assert wrong_of(place) is None, "within a second it is not listened to"
    for sock in waiting:
        sock.close()
    time.sleep(1.0)
    assert wrong_of(place) == b""


def wrong_of(place: Place) -> bytes | None:
    with place.call() as sock:
        greeting = sock.recv(56)
        if not greeting:
            return None
        sock.sendall(knock_for(greeting, b"t" * 32))
        return sock.recv(33)


def test_a_flood_fills_no_log(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for _ in range(300):
            place.call().close()
        wait_until(lambda: place.door.refused == 300, 5)
    assert len(caplog.records) <= 9
    assert place.door.busiest() == "127.0.0.1"


def test_nothing_is_left_of_a_door() -> None:
    place = Place()
    client = place.client()
    place.door.close()
    with pytest.raises(OSError):
        place.call()
    with pytest.raises(dist.DistError):
        client.store.get("x")
    wait_until(lambda: not [t for t in threading.enumerate() if t.name == "door"], 5)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "node1", "192.168.1.1", "::2"])
def test_other_interfaces_want_a_secret(host: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"--host {host}: .*make one.*--secret-file FILE"):
        check(host, None)
    path = tmp_path / "secret"
    path.touch(0o600)
    path.write_bytes(SECRET + b"\r\n")
    check(host, str(path))
    assert read_secret(str(path)) == SECRET
    for own in ("127.0.0.1", "127.8.8.8", "::1", "localhost"):
        check(own, None)


@pytest.mark.parametrize(
    ("size", "mode", "says"),
    [
        (31, 0o600, "wanted 32 to 65536 bytes, got 31"),
        (1 << 17, 0o600, "wanted 32 to 65536 bytes, got more"),
        (32, 0o640, r"mode 0640\): chmod 600"),
        (32, 0o604, "mode 0604"),
        (32, 0o622, "mode 0622"),
    ],
)
def test_what_is_no_secret(size: int, mode: int, says: str, tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_bytes(b"s" * size)
    path.chmod(mode)
    with pytest.raises(ValueError, match=says):
        read_secret(str(path))
    with pytest.raises(ValueError, match="No such file"):
        read_secret(str(tmp_path / "none"))
    os.mkfifo(tmp_path / "pipe", 0o600)
    for other in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(ValueError, match="wanted a file"):
            read_secret(str(other))
