"""A rank's way through the door of a core on another machine (`start.knock`)."""

from __future__ import annotations

import hmac
import logging
import math
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from psyche_fast.start import knock

log = logging.getLogger("psyche_fast.sidecar")

_TAKEN_SECONDS = 5.0
"""How long a rank that comes back waits for the end of what it was before."""
_SAYS_SO = 3.0
"""How long it waits for the core in silence."""


class _TryAgain(Exception):
    """Not now, but perhaps soon: for as many seconds it is worth another attempt."""

    def __init__(self, why: str, seconds: float) -> None:
        super().__init__(why)
        self.seconds = seconds


@dataclass
class Relay:
    """A rank's own loopback port that leads through a core's door.

    Args:
        host: the core's address.
        port: likewise.
        secret: what both know.
        rank: who comes.
        timeout: seconds within which the core has to be there.

    Attributes:
        local: the port.

    Raises:
        ValueError: nobody answers there, it is no door, or it does not let this rank in.
    """

    host: str
    port: int
    secret: bytes
    rank: int
    timeout: float

    def __post_init__(self) -> None:
        self._life = secrets.token_bytes(16)
        self._run: bytes | None = None
        # torch tries a door that is shut again and again, and noisily: this says it in one line.
        self._first: socket.socket | None = self._come_in(self.timeout)
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=16)
        self.local: int = self._listening.getsockname()[1]
        threading.Thread(target=self._listen, daemon=True, name="relay").start()

    def close(self) -> None:
        """Opens no further connections; those that there are go on."""
        knock.end(self._listening)
        self._listening.close()

    def _listen(self) -> None:
        while True:
            try:
                inside, _ = self._listening.accept()
            except OSError:  # closed
                return
            outside, self._first = self._first, None
            threading.Thread(target=self._lead, args=(inside, outside), daemon=True).start()

    def _lead(self, inside: socket.socket, outside: socket.socket | None) -> None:
        with inside:
            try:
                with outside or self._come_in(_TAKEN_SECONDS) as there:
                    knock.tune(inside, self.timeout)
                    knock.splice(inside, there)
            except (ValueError, OSError) as error:
                log.error("%s", error)

    def _come_in(self, seconds: float) -> socket.socket:
        """A connection to what is behind the door; waits for it to be there."""
        return _patiently(lambda: self._knock(), seconds, self._where)

    @property
    def _where(self) -> str:
        return f"{self.host}:{self.port}"

    def _knock(self) -> socket.socket:
        sock = _connect(self.host, self.port)
        try:
            greeting = _greeting(sock)
            if greeting is None:
                raise ValueError(
                    f"--secret-file: no core that has one listens at {self._where}; leave it out, "
                    "or give it to the core too"
                )
            _, run, _ = knock.GREETING.unpack(greeting)
            if self._run not in (None, run):
                raise ValueError(f"another run listens at {self._where} by now")
            words = knock.KNOCK.pack(self._life, self.rank, secrets.token_bytes(32))
            try:
                sock.sendall(words + knock.mac(self.secret, b"knock", greeting, words))
                reply = knock.read(sock, 1 + knock.MAC, time.monotonic() + 10 * knock.SECONDS)
            except OSError as error:
                raise ValueError(
                    f"the core at {self._where} does not let rank {self.rank} in: is "
                    "--secret-file the same there?"
                ) from error
            status, mac = reply[:1], reply[1:]
            if not hmac.compare_digest(
                mac, knock.mac(self.secret, b"reply", greeting, words, status)
            ):
                raise ValueError(
                    f"whoever listens at {self._where} does not know the secret of --secret-file"
                )
            if status == knock.TAKEN:
                raise _TryAgain(
                    f"rank {self.rank} is there already: does another process have it "
                    "(--start-rank)?",
                    _TAKEN_SECONDS,
                )
            self._run = run
            knock.tune(sock, self.timeout)
            return sock
        except BaseException:
            sock.close()
            raise


def refuse_if_shut(host: str, port: int, seconds: float) -> None:
    """Looks whether a door is where a rank without a secret wants to find a store.

    Raises:
        ValueError: there is one, or nobody.
    """
    with _patiently(lambda: _connect(host, port), seconds, f"{host}:{port}") as sock:
        # A store says nothing of its own accord, a door does at once.
        if _greeting(sock, 0.3) is not None:
            raise ValueError(
                f"the core at {host}:{port} lets nobody in without its secret: give --secret-file"
            )


def _patiently(attempt: Callable[[], socket.socket], seconds: float, where: str) -> socket.socket:
    """What an attempt gives that somebody has to be there for; tries again for a while."""
    began, pause, said = time.monotonic(), 0.1, False
    while True:
        waited = time.monotonic() - began
        try:
            return attempt()
        except _TryAgain as error:
            if waited > min(seconds, error.seconds):
                raise ValueError(str(error)) from error
        except OSError as error:
            why = error.strerror or error
            if waited > seconds:
                raise ValueError(f"--init-method: no store answers at {where}: {why}") from error
            if waited > _SAYS_SO and not said:
                said = True
                log.warning("waiting for the core: nobody listens at %s yet (%s)", where, why)
        time.sleep(pause)
        pause = min(1.5 * pause, 1.2 * knock.PAUSE)


def _connect(host: str, port: int) -> socket.socket:
    sock = socket.create_connection((host, port), 10 * knock.SECONDS)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def _greeting(sock: socket.socket, seconds: float = 5 * knock.SECONDS) -> bytes | None:
    """What a door says first; None where it is none.

    Raises:
        _TryAgain: it has closed the connection instead, for it has too much to do.
    """
    try:
        greeting = knock.read(sock, knock.GREETING.size, time.monotonic() + seconds)
    except ConnectionError as error:
        raise _TryAgain(f"the core closes the connection: {error}", math.inf) from error
    except TimeoutError:
        return None
    return greeting if greeting.startswith(knock.MAGIC) else None
