"""`psyche-fast link` and who asks it: strangers, silence, and bounds."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from unittest import mock

import pytest

from psyche_fast.start import probe
from psyche_fast.start.network import listen


@contextmanager
def serving() -> Iterator[tuple[int, list[str]]]:
    said: list[str] = []
    listener = listen("127.0.0.1", 0)
    threading.Thread(target=_serve, args=(listener, said), daemon=True).start()
    yield listener.getsockname()[1], said
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()


def _serve(listener: socket.socket, said: list[str]) -> None:
    try:
        probe.serve(listener, said.append)
    except OSError:
        return  # the test has closed it


def test_a_machine_is_measured_from_another() -> None:
    with serving() as (port, said), mock.patch.object(probe, "MOST_SECONDS", 0.1):
        link = probe.ask(f"127.0.0.1:{port}")
        again = probe.ask(f"[127.0.0.1]:{port}")
    assert min(link.up, link.down, again.up) > 1e6
    assert 0 < link.latency < 0.5
    assert said[0] == "measured with 127.0.0.1"


@pytest.mark.parametrize(
    "first",
    [
        b"",
        b"GET / HTTP/1.1\r\n\r\n" * 2,
        probe.REQUEST.pack(probe.MAGIC, b"d", probe.MOST_BYTES + 1),
        probe.REQUEST.pack(probe.MAGIC, b"u", 1 << 63),
        probe.REQUEST.pack(probe.MAGIC, b"x", 100),
        probe.REQUEST.pack(probe.MAGIC, b"p", probe.PINGS + 1),
        probe.REQUEST.pack(probe.MAGIC, b"u", 1 << 20) + b"0" * 100,  # and then nothing
    ],
)
def test_a_stranger_gets_nothing_and_holds_nobody_up(first: bytes) -> None:
    with (
        serving() as (port, _),
        mock.patch.object(probe, "ANSWER_SECONDS", 0.3),
        mock.patch.object(probe, "MOST_SECONDS", 0.1),
        closing(socket.create_connection(("127.0.0.1", port), 5)) as stranger,
    ):
        stranger.settimeout(5)
        stranger.sendall(first)
        assert stranger.recv(8) == probe.MAGIC
        assert probe_soon(port) > 1e6
        assert stranger.recv(1 << 16) == b""


def probe_soon(port: int) -> float:
    """Who asks next waits for a stranger's time-out."""
    for _ in range(20):
        try:
            return probe.ask(f"127.0.0.1:{port}").up
        except ValueError:
            continue
    raise AssertionError("the stranger holds it up")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("127.0.0.1:{closed}", "nobody answers at 127.0.0.1 port {closed} (Connection refused)"),
        ("127.0.0.1:{silent}", "nobody answers at 127.0.0.1 port {silent} (timed out)"),
        ("127.0.0.1:{other}", "what answers there is no `psyche-fast link`"),
        ("127.0.0.1:0", "wanted HOST, HOST:PORT, or a link such as 10Mbit,100ms"),
        ("a:b:c", "wanted HOST, HOST:PORT, or a link such as 10Mbit,100ms"),
    ],
)
def test_nobody_there_is_one_line(text: str, says: str) -> None:
    with (
        closing(listen("127.0.0.1", 0)) as silent,
        closing(listen("127.0.0.1", 0)) as closed,
        closing(listen("127.0.0.1", 0)) as other,
        mock.patch.object(probe, "ANSWER_SECONDS", 0.2),
    ):
        ports = {"silent": silent, "closed": closed, "other": other}
        numbers = {name: sock.getsockname()[1] for name, sock in ports.items()}
        closed.close()
        threading.Thread(target=_talk, args=(other,), daemon=True).start()
        with pytest.raises(ValueError) as error:
            probe.ask(text.format(**numbers))
        assert says.format(**numbers) in str(error.value)
        assert "\n" not in str(error.value)


def _talk(sock: socket.socket) -> None:
    try:
        client, _ = sock.accept()
    except OSError:
        return
    with client:
        client.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")
        client.settimeout(2)
        try:
            client.recv(1)
        except OSError:
            return


@pytest.mark.parametrize(
    ("text", "is_host"),
    [
        ("10Mbit,100ms", False), ("1Gbit", False), ("10Mbit/1Gbit,5 ms", False), ("5,5", False),
        ("node1", True), ("node1:34568", True), ("10.0.0.1", True), ("[::1]:5", True),
    ],
)  # fmt: skip
def test_a_link_is_told_from_a_host(text: str, is_host: bool) -> None:
    assert probe.is_host(text) == is_host
