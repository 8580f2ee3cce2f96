"""What a link between two machines carries: `psyche-fast link` answers, `estimate --link` asks.

One connection, on which the asking side says what comes next: pings, or a message up or down, of a
size that grows until the link's rate is known. Who answers serves one at a time, for so many
seconds and bytes at most, and gives zeros away and nothing else. `rank.link` measures between
replicas by the same `Pace` and `arrivals`.
"""

from __future__ import annotations

import math
import re
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise

from psyche_fast.links import Link

PORT = 34568
PINGS = 6
FIRST_BYTES = 1 << 18
MOST_BYTES = 1 << 28
"""Of a message."""
PIECES = 32
"""Of a message."""
TARGET_SECONDS = 0.8
"""What a message is to take, to say what a link carries."""
MOST_SECONDS = 4.0
"""After which no further message is sent."""
_SHORT = 0.01
_MORE, _MOST = 1.1, 2.2
"""Between what the usual rate is to the mean one, where both are of one link."""
_SAME = 0.1
"""By how much two rates may differ."""

MAGIC = b"pflink\x01\n"
REQUEST = struct.Struct("<8scQ")
"""Magic, kind, and pings or bytes."""
_FOUND = struct.Struct("<dd")
_PING, _UP, _DOWN, _CLOCK = b"p", b"u", b"d", b"c"
_TIME = struct.Struct("<d")
"""Seconds since 1970, by the other machine's clock."""
ANSWER_SECONDS = 5.0
"""How long either side waits for the other to go on."""
CONNECTION_SECONDS = 60.0
"""How long one asks at most."""
_BLOCK = 1 << 16
_HOST = re.compile(r"\[(?P<six>[^\]]+)\](?::(?P<p>\d+))?|(?P<host>[^:\s]+)(?::(?P<port>\d+))?")


class Pace:
    """How many bytes go over a link next, until its rate is known.

    A sender's speed grows from round trip to round trip, and falls where a packet is lost. Once it
    fills the link, the next message is as fast.

    Attributes:
        size: bytes of the next message; 0 once the rate is known.
        rate: bits in a second.
    """

    def __init__(self) -> None:
        self.size, self.rate = FIRST_BYTES, 0.0
        self._spent = self._before = 0.0

    def took(self, seconds: float, rate: float) -> None:
        """Says what `arrivals` has found."""
        self._spent += seconds
        known = abs(rate - self._before) < _SAME * rate
        self.rate, self._before = max(rate, self._before if known else self.rate), rate
        done = known and seconds >= TARGET_SECONDS / 2
        if done or self._spent > MOST_SECONDS or self.size == MOST_BYTES:
            self.size = 0
        else:
            more = min(max(TARGET_SECONDS / max(seconds, 1e-6), 1.2), 8.0)
            self.size = min(int(self.size * more), MOST_BYTES)


def arrivals(began: float, times: Sequence[float], piece: int) -> tuple[float, float]:
    """What a link carries, by when the pieces of a message came.

    Args:
        began: when the first one may have been sent at the latest.
        times: when each came.
        piece: bytes of each.

    Returns:
        Seconds from the first to the last piece, and bits in a second. That is by the median of the
        times between two pieces, since some come late and many at once after them where a packet
        was lost or a sender had yet to find its speed; by all of them where most are like that.
    """
    seconds = times[-1] - times[0]
    if seconds < _SHORT:  # they were all there when this process looked
        return seconds, 8 * piece * len(times) / max(times[-1] - began, 1e-6)
    whole = 8 * piece * (len(times) - 1) / seconds
    gaps = sorted(after - before for before, after in pairwise(times))
    usual = 8 * piece / max(gaps[len(gaps) // 2], 1e-9)
    return seconds, usual if whole < _MORE * usual < _MOST * whole else whole


def is_host(text: str) -> bool:
    """Whether `--link` names another machine, rather than says what a link carries."""
    return "," not in text and re.match(r"[\d.]+ *[kmg]?bit", text, re.IGNORECASE) is None


def parse_host(text: str) -> tuple[str, int]:
    """Host and port of `HOST`, `HOST:PORT` or `[ADDRESS]:PORT`.

    Raises:
        ValueError: another form.
    """
    match = _HOST.fullmatch(text)
    port = int((match["p"] or match["port"] or PORT) if match else 0)
    if match is None or not 0 < port < 1 << 16:
        raise ValueError(f"--link {text}: wanted HOST, HOST:PORT, or a link such as 10Mbit,100ms")
    return match["six"] or match["host"], port


def ask(text: str) -> Link:
    """Measures the link to another machine, on which `psyche-fast link` runs.

    Args:
        text: as of `parse_host`.

    Raises:
        ValueError: the text has another form, or nobody answers there as wanted.
    """
    with _connected(text) as (sock, deadline):
        latency = _ping(sock, deadline)
        up = _paced(lambda size: _send_up(sock, size, deadline))
        down = _paced(lambda size: _ask_down(sock, size, deadline))
    return Link(up, down, latency)


def ask_clock(text: str) -> float:
    """By how many seconds the clock of another machine, on which `psyche-fast link` runs, is ahead.

    Args:
        text: as of `parse_host`.

    Raises:
        ValueError: the text has another form, or nobody answers there as wanted.
    """
    with _connected(text) as (sock, deadline):
        found = []
        for _ in range(PINGS):
            sock.sendall(REQUEST.pack(MAGIC, _CLOCK, 1))
            began, clock = time.perf_counter(), time.time()
            (there,) = _TIME.unpack(_read(sock, _TIME.size, deadline))
            seconds = time.perf_counter() - began
            found.append((seconds, there - clock - seconds / 2))
    return min(found)[1]  # of the answer that has waited least


@contextmanager
def _connected(text: str) -> Iterator[tuple[socket.socket, float]]:
    """A connection to `psyche-fast link`, and until when it may be used."""
    host, port = parse_host(text)
    try:
        with socket.create_connection((host, port), timeout=ANSWER_SECONDS) as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            deadline = time.monotonic() + CONNECTION_SECONDS
            if _read(sock, len(MAGIC), deadline) != MAGIC:
                raise ValueError(f"--link {text}: what answers there is no `psyche-fast link`")
            yield sock, deadline
    except OSError as error:
        why = error.strerror or str(error) or type(error).__name__
        raise ValueError(
            f"--link {text}: nobody answers at {host} port {port} ({why}); run "
            f"`psyche-fast link --port {port}` there"
        ) from error


def _paced(once: Callable[[int], tuple[float, float]]) -> float:
    pace = Pace()
    while pace.size:
        pace.took(*once(pace.size))
    return pace.rate


def _ping(sock: socket.socket, deadline: float) -> float:
    sock.sendall(REQUEST.pack(MAGIC, _PING, PINGS))
    trips = []
    for _ in range(PINGS):
        began = time.perf_counter()
        sock.sendall(b"\0")
        _read(sock, 1, deadline)
        trips.append(time.perf_counter() - began)
    return min(trips) / 2


def _send_up(sock: socket.socket, size: int, deadline: float) -> tuple[float, float]:
    sock.sendall(REQUEST.pack(MAGIC, _UP, size))
    _write(sock, size, deadline)
    seconds, rate = _FOUND.unpack(_read(sock, _FOUND.size, deadline))
    if not (math.isfinite(seconds) and math.isfinite(rate) and seconds >= 0 and rate > 0):
        raise OSError("it answers with what is no rate")
    return seconds, rate


def _ask_down(sock: socket.socket, size: int, deadline: float) -> tuple[float, float]:
    sock.sendall(REQUEST.pack(MAGIC, _DOWN, size))
    return _timed(sock, size, deadline)


def _timed(sock: socket.socket, size: int, deadline: float) -> tuple[float, float]:
    """Reads a message by pieces."""
    began, times, piece = time.perf_counter(), [], size // PIECES
    for number in range(PIECES):
        _skip(sock, piece if number else size - piece * (PIECES - 1), deadline)
        times.append(time.perf_counter())
    return arrivals(began, times, piece)


def _read(sock: socket.socket, size: int, deadline: float) -> bytes:
    found = bytearray()
    while len(found) < size:
        found += _receive(sock, size - len(found), deadline)
    return bytes(found)


def _skip(sock: socket.socket, size: int, deadline: float) -> None:
    while size:
        size -= len(_receive(sock, min(size, _BLOCK), deadline))


def _receive(sock: socket.socket, most: int, deadline: float) -> bytes:
    _wait(sock, deadline)
    part = sock.recv(most)
    if not part:
        raise ConnectionResetError("the connection has ended")
    return part


def _write(sock: socket.socket, size: int, deadline: float) -> None:
    zeros = bytes(_BLOCK)
    while size:
        _wait(sock, deadline)
        size -= sock.send(memoryview(zeros)[: min(size, _BLOCK)])


def _wait(sock: socket.socket, deadline: float) -> None:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError(f"not done after {CONNECTION_SECONDS:g} s")
    sock.settimeout(min(left, ANSWER_SECONDS))


def read_request(data: bytes) -> tuple[bytes, int]:
    """Kind and size of what is asked for.

    Raises:
        ValueError: it is nothing that is answered.
    """
    magic, kind, size = REQUEST.unpack(data)
    limits = {
        _CLOCK: (1, 1),
        _PING: (1, PINGS),
        _UP: (PIECES, MOST_BYTES),
        _DOWN: (PIECES, MOST_BYTES),
    }
    least, most = limits.get(kind, (1, 0))
    if magic != MAGIC or not least <= size <= most:
        raise ValueError(f"a request of {kind!r} and {size}")
    return kind, size


def answer(sock: socket.socket) -> None:
    """Serves whoever has connected until he goes.

    Raises:
        OSError: he does not go on, or takes too long.
        ValueError: he asks for what is not answered.
    """
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    deadline = time.monotonic() + CONNECTION_SECONDS
    sock.settimeout(ANSWER_SECONDS)
    sock.sendall(MAGIC)
    while True:
        _wait(sock, deadline)
        first = sock.recv(1)
        if not first:
            return
        kind, size = read_request(first + _read(sock, REQUEST.size - 1, deadline))
        if kind == _PING:
            for _ in range(size):
                sock.sendall(_read(sock, 1, deadline))
        elif kind == _CLOCK:
            sock.sendall(_TIME.pack(time.time()))
        elif kind == _UP:
            sock.sendall(_FOUND.pack(*_timed(sock, size, deadline)))
        else:
            _write(sock, size, deadline)


def serve(listener: socket.socket, tell: Callable[[str], None]) -> None:
    """Answers one after the other, for ever.

    Args:
        listener: listens.
        tell: takes lines for the user.
    """
    while True:
        sock, address = listener.accept()
        with sock:
            try:
                answer(sock)
                tell(f"measured with {address[0]}")
            except (OSError, ValueError) as error:
                tell(f"{address[0]}: {error}")
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
