"""What ranks on other machines show at a core's door: a secret that they share, and how.

torch's store asks nobody who he is, so that it listens on loopback alone. Where other machines are
to reach it, a `door.Door` listens in its place and hands on, to and from the store, what those say
that have shown that they know the secret; a rank there has a `relay.Relay` on its own loopback,
which knocks for each connection that torch opens. What is said afterwards is neither encrypted nor
sealed (SECURITY.md).

A knock: the door says a greeting (what it is, the run, a nonce), the rank answers with its life (a
number drawn when it starts), its rank, a nonce and an HMAC-SHA256 of all of it, and the door with a
status and one of its own. Nonces of both sides make a knock worth nothing a second time.
"""

from __future__ import annotations

import hmac
import ipaddress
import socket
import stat
import struct
import threading
import time
from contextlib import suppress
from pathlib import Path

SECRET_BYTES = 32
"""The fewest that a secret has."""
MAKE_SECRET = "(umask 077; openssl rand -base64 32 > FILE)"
"""How to make one."""
_LONGEST_SECRET = 1 << 16

MAGIC = b"pfdoor\x01\n"
GREETING = struct.Struct("8s16s32s")
"""Magic, run, nonce."""
KNOCK = struct.Struct("<16sI32s")
"""Life, rank, nonce; an HMAC follows."""
MAC = 32
COME_IN, TAKEN = b"\0", b"\1"
"""What a door answers; an HMAC follows."""

SECONDS = 2.0
"""How long a knock may take."""
PAUSE = 1.0
"""Seconds that a door does not listen to an address after a knock of its that was refused."""
_BLOCK = 1 << 16


def is_own_machine(host: str) -> bool:
    """Whether a name or address can be reached from this machine alone, as far as it says."""
    if host in ("localhost", "ip6-localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check(host: str, secret_file: str | None) -> None:
    """Checks that a core that other machines reach has a secret, and that it is one.

    Raises:
        ValueError: it has none, or `read_secret`'s.
    """
    if secret_file is not None:
        read_secret(secret_file)
    elif not is_own_machine(host):
        raise ValueError(
            f"--host {host}: other machines come in only by a secret that all machines of the run "
            f"have: make one, {MAKE_SECRET}, copy it, and give --secret-file FILE on each"
        )


def read_secret(secret_file: str) -> bytes:
    """The content of `--secret-file`, without the end of its last line.

    Raises:
        ValueError: there is no such file, others may read it, or it is too short.
    """
    what = f"--secret-file {secret_file}"
    try:
        state = Path(secret_file).stat()
        if not stat.S_ISREG(state.st_mode):  # nobody may ever write to a pipe
            raise ValueError(f"{what}: wanted a file")
        with Path(secret_file).open("rb") as file:
            secret = file.read(_LONGEST_SECRET + 1).rstrip(b"\r\n")
    except OSError as error:
        raise ValueError(f"{what}: {error.strerror}; make one: {MAKE_SECRET}") from error
    if state.st_mode & 0o077:
        raise ValueError(
            f"{what}: others than its owner may read or write it (mode "
            f"{stat.S_IMODE(state.st_mode):04o}): chmod 600 {secret_file}, or make a new one"
        )
    if not SECRET_BYTES <= len(secret) <= _LONGEST_SECRET:
        raise ValueError(
            f"{what}: wanted {SECRET_BYTES} to {_LONGEST_SECRET} bytes, got "
            f"{'more' if len(secret) > _LONGEST_SECRET else len(secret)}; make one: {MAKE_SECRET}"
        )
    return secret


def mac(secret: bytes, *parts: bytes) -> bytes:
    """HMAC-SHA256 of parts, each of a fixed length."""
    return hmac.digest(secret, b"".join(parts), "sha256")


def read(sock: socket.socket, size: int, deadline: float) -> bytes:
    """As many bytes, in time.

    Raises:
        OSError: the connection has ended, or it is late.
    """
    parts: list[bytes] = []
    while size:
        sock.settimeout(max(deadline - time.monotonic(), 0.01))
        part = sock.recv(size)
        if not part:
            raise ConnectionResetError("the connection has ended")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def splice(one: socket.socket, other: socket.socket) -> None:
    """Hands on what two connections say until both have said all."""
    back = threading.Thread(target=_hand_on, args=(other, one), daemon=True)
    back.start()
    _hand_on(one, other)
    back.join()


def _hand_on(source: socket.socket, target: socket.socket) -> None:
    try:
        while said := source.recv(_BLOCK):
            target.sendall(said)
        target.shutdown(socket.SHUT_WR)
    except OSError:  # one of them is lost
        end(source)
        end(target)


def end(sock: socket.socket) -> None:
    """Ends a connection, or wakes who listens; its descriptor is its owner's to close."""
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def tune(sock: socket.socket, timeout: float) -> None:
    """Without delays, and lost once the other machine has been silent for so many seconds."""
    sock.settimeout(None)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    every = max(1, int(timeout / 4))
    for name, value in (("TCP_KEEPIDLE", every), ("TCP_KEEPINTVL", every), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), min(value, 32767))
