"""The door before the store, on the core's machine (`start.knock`)."""

from __future__ import annotations

import hashlib
import hmac
import logging
import secrets
import socket
import threading
import time
from collections import Counter, OrderedDict

from psyche_fast.start import knock

log = logging.getLogger("psyche_fast.door")

_PENDING = 64
"""Knocks at one time; those of one address are at most a quarter of them."""
_ADDRESSES = 4096
"""Addresses that are remembered."""


class Door:
    """Lets those through to a port of this machine's loopback that know a secret.

    Args:
        sock: listens for them; the door closes it.
        port: where it leads.
        secret: what they have to know.
        run: the run's name; a rank that has come in does not come into another one.
        timeout: seconds after which a connection counts as lost whose machine is silent.

    Attributes:
        refused: how many knocks have been refused.
        addresses: whose they were, as far as they are remembered.
    """

    def __init__(
        self, sock: socket.socket, port: int, secret: bytes, run: str, timeout: float
    ) -> None:
        self.refused = 0
        self.addresses: OrderedDict[str, int] = OrderedDict()
        self._sock, self._port, self._secret, self._timeout = sock, port, secret, timeout
        self._run = hashlib.sha256(run.encode()).digest()[:16]
        self._lock = threading.Lock()
        self._closed = False
        self._open: set[socket.socket] = set()
        self._knocking: Counter[str] = Counter()
        self._not_before: OrderedDict[str, float] = OrderedDict()
        self._lives: dict[int, tuple[bytes, int]] = {}
        sock.settimeout(1.0)  # closing it wakes nobody on some systems
        threading.Thread(target=self._listen, daemon=True, name="door").start()

    def close(self) -> None:
        """Lets nobody in any more and ends what is under way."""
        with self._lock:
            self._closed = True
            ending = [self._sock, *self._open]
        for sock in ending:
            knock.end(sock)
        self._sock.close()

    def busiest(self) -> str:
        """The address with the most refused knocks."""
        return max(self.addresses, key=self.addresses.__getitem__, default="")

    def _listen(self) -> None:
        while not self._closed:
            try:
                sock, address = self._sock.accept()
            except TimeoutError:
                continue
            except OSError:  # closed, or no descriptors left for now
                time.sleep(0.05)
                continue
            host = str(address[0])
            if self._is_heard(host):
                arguments = (sock, host)
                threading.Thread(target=self._serve, args=arguments, daemon=True).start()
            else:
                sock.close()

    def _is_heard(self, host: str) -> bool:
        """Whether a connection may knock, which then counts as under way."""
        with self._lock:
            full = sum(self._knocking.values()) >= _PENDING
            if full or self._knocking[host] >= _PENDING // 4:
                self._count(host, "too many knock at one time")
            elif time.monotonic() < self._not_before.get(host, 0.0):
                self._count(host, "it has been refused within the last second")
            else:
                self._knocking[host] += 1
                return True
            return False

    def _count(self, host: str, why: str) -> None:
        """Counts a refusal; the lock is held. Powers of two are logged: a flood fills no disk."""
        self.refused += 1
        count = self.addresses[host] = self.addresses.pop(host, 0) + 1
        if len(self.addresses) > _ADDRESSES:
            self.addresses.popitem(last=False)
        if count & (count - 1) == 0:
            log.warning("the door: knock %d from %s is refused: %s", count, host, why)

    def _serve(self, sock: socket.socket, host: str) -> None:
        """A connection from its knock to its end, in a thread of its own."""
        with sock:
            rank = self._admit(sock, host)
            if rank is None:
                return
            try:
                with socket.create_connection(("127.0.0.1", self._port), knock.SECONDS) as inside:
                    knock.tune(sock, self._timeout)
                    knock.tune(inside, self._timeout)
                    with self._lock:
                        if self._closed:
                            return
                        self._open |= {sock, inside}
                    try:
                        knock.splice(sock, inside)
                    finally:
                        with self._lock:
                            self._open -= {sock, inside}
            except OSError as error:
                log.warning("the door: rank %d cannot be led to the store: %s", rank, error)
            finally:
                self._leave(rank)

    def _admit(self, sock: socket.socket, host: str) -> int | None:
        """The rank that has knocked rightly, now counted as there; None where it is refused."""
        why = None
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            deadline = time.monotonic() + knock.SECONDS
            greeting = knock.GREETING.pack(knock.MAGIC, self._run, secrets.token_bytes(32))
            sock.settimeout(knock.SECONDS)
            sock.sendall(greeting)
            said = knock.read(sock, knock.KNOCK.size + knock.MAC, deadline)
            words, mac = said[: knock.KNOCK.size], said[knock.KNOCK.size :]
            if not hmac.compare_digest(mac, knock.mac(self._secret, b"knock", greeting, words)):
                why = "it does not know the secret"
                return None
            life, rank, _ = knock.KNOCK.unpack(words)
            status = self._enter(rank, life)
            if status == knock.TAKEN:
                with self._lock:  # it knows the secret: no reason not to listen to it
                    self._count(host, f"rank {rank} is there already")
            try:
                sock.sendall(status + knock.mac(self._secret, b"reply", greeting, words, status))
            except OSError:
                if status == knock.COME_IN:
                    self._leave(rank)
                raise
            if status == knock.TAKEN:
                return None
            sock.settimeout(None)
            return int(rank)
        except OSError as error:
            why = (
                f"it did not knock within {knock.SECONDS:g} s"
                if isinstance(error, TimeoutError)
                else f"{error}"
            )
            return None
        finally:
            with self._lock:
                self._knocking[host] -= 1
                if not self._knocking[host]:
                    del self._knocking[host]
                if why is not None:
                    self._count(host, why)
                    self._not_before[host] = time.monotonic() + knock.PAUSE
                    self._not_before.move_to_end(host)
                    if len(self._not_before) > _ADDRESSES:
                        self._not_before.popitem(last=False)

    def _enter(self, rank: int, life: bytes) -> bytes:
        """A rank opens one connection after the other; one that has died may come again."""
        with self._lock:
            there, count = self._lives.get(rank, (life, 0))
            if there != life:
                return knock.TAKEN
            self._lives[rank] = life, count + 1
            return knock.COME_IN

    def _leave(self, rank: int) -> None:
        with self._lock:
            life, count = self._lives.pop(rank)
            if count > 1:
                self._lives[rank] = life, count - 1
