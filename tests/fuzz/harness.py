"""Bytes that anybody may send, mutated from valid ones: a parser takes them or says a clear error.

`FUZZ_SECONDS=600` in the environment goes on for ten minutes a parser, `FUZZ_SEED` begins with
other mutations.
"""

from __future__ import annotations

import os
import resource
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SECONDS = float(os.environ.get("FUZZ_SECONDS", "0.5"))
SEED = int(os.environ.get("FUZZ_SEED", "0"))
CLEAR = (ValueError, TypeError, OSError)
"""What a user's mistake is, and so what hostile bytes may be."""
_PATIENCE = {signal.ITIMER_PROF: 5.0, signal.ITIMER_REAL: 60.0}
"""Seconds of the processor and of the clock that a parser has for an input."""
_MEMORY = 2 << 30
"""Bytes of address space that a parser may take beside what its process has."""
_WORDS = (
    b"\x00", b"\xff", b"\xff\xff\xff\xff", b"\x7f" * 8, b"\x80", b"-1", b"0", b"1e999", b"NaN",
    b"null", b"true", b'""', b"[]", b"{}", b"999999999999999999999", b"\xed\xa0\x80", b"[" * 2000,
    b'{"a":' * 2000, b"\\ud800", b"..", b"/etc/passwd", b"~", b"'", b'"', b"\n", b",", b"=", b"0.5",
)  # fmt: skip


class Hangs(BaseException):
    """A parser goes on for too long."""


@dataclass(frozen=True)
class Found:
    """What came of it.

    Attributes:
        tried: inputs.
        accepted: those that were taken.
        refused: those that were not.
        wrong: an input that has done something else, and what; None for none.
    """

    tried: int
    accepted: int
    refused: int
    wrong: tuple[bytes, str] | None


def mutated(seeds: list[bytes], rng: np.random.Generator) -> bytes:
    """One of the seeds, changed in one to eight places."""
    out = bytearray(seeds[rng.integers(len(seeds))])
    for _ in range(rng.choice([1, 1, 1, 2, 3, 8])):
        at = int(rng.integers(len(out) + 1))
        if rng.random() < 0.5:  # heads are where parsers look
            at = int(rng.integers(min(len(out), 400) + 1))
        length = int(rng.integers(1, 9))
        match rng.integers(9):
            case 0:
                del out[at:]
            case 1 | 2 | 3:
                out[at : at + 1] = rng.bytes(1)
            case 4:
                del out[at : at + length]
            case 5:
                out[at:at] = rng.bytes(length)
            case 6 | 7:
                word = _WORDS[rng.integers(len(_WORDS))]
                out[at : at + int(rng.choice([0, 1, len(word)]))] = word
            case 8:
                other = seeds[rng.integers(len(seeds))]
                begin = int(rng.integers(len(other) + 1))
                out[at : at + length] = other[begin : begin + int(rng.integers(64))]
    return bytes(out)


def inputs(seeds: list[bytes], seconds: float) -> Iterator[bytes]:
    """The seeds, some of their beginnings, and mutations for as long."""
    rng, until = np.random.default_rng(SEED), time.monotonic() + seconds
    yield from seeds
    while time.monotonic() < until:
        seed = seeds[rng.integers(len(seeds))]
        if rng.random() < 0.05:
            yield seed[: rng.integers(len(seed) + 1)]
        else:
            yield mutated(seeds, rng)


def fuzz(seeds: list[bytes], parse: Callable[[bytes], Any], seconds: float = SECONDS) -> Found:
    """Feeds a parser; to be called in a process of its own, whose memory it limits."""

    def hang(*_: object) -> None:
        raise Hangs("it goes on and on")

    for number in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(number, hang)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + _MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    tried = accepted = 0
    for data in inputs(seeds, seconds):
        tried += 1
        for timer, patience in _PATIENCE.items():
            signal.setitimer(timer, patience)
        try:
            parse(data)
            accepted += 1
        except CLEAR as error:
            said = str(error)
            if not said or len(said) > 20_000:
                return Found(tried, accepted, 0, (data, f"says nothing of use: {error!r}"))
        except BaseException:
            return Found(tried, accepted, tried - accepted, (data, traceback.format_exc()))
        finally:
            for timer in _PATIENCE:
                signal.setitimer(timer, 0)
    return Found(tried, accepted, tried - accepted, None)
