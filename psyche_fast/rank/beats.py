"""A sign of life from every rank, once a second, and what it was doing when a run hangs.

A rank that is stopped, or whose machine is cut off, raises nothing anywhere: collectives wait for
it, and say at their time-out that somebody is missing but not who. The core compares the signs of
life (`core/watch.py`).
"""

from __future__ import annotations

import faulthandler
import logging
import platform
import statistics
import threading
from collections import deque
from contextlib import suppress
from pathlib import Path

import msgspec
import torch.distributed as dist

from psyche_fast.compat import collectives_trace
from psyche_fast.start.store import StoreClient

log = logging.getLogger(__name__)

STACKS = "beats/stacks"
"""Store key: set, every rank writes down what it is doing."""
SECONDS = 1.0
"""From one sign of life to the next."""
_STEPS = 5
"""How many have to have been trained before their duration is known."""


class Beat(msgspec.Struct, frozen=True, array_like=True):
    """A sign of life.

    Attributes:
        count: how many there have been.
        step: that the rank is in, or has trained last.
        phase: what it does there; `waiting` where nobody waits for it.
        host: its machine's name.
    """

    count: int
    step: int
    phase: str
    host: str


def beat_key(rank: int) -> str:
    """Where a rank leaves its last sign of life."""
    return f"beats/{rank}"


class Patience:
    """How long a step may take: `--timeout` at first, then ten times what they usually take.

    Args:
        most: seconds, of `--timeout`.
        least: seconds that are waited in any case, where `most` are not less.
    """

    def __init__(self, most: float, least: float = 30.0) -> None:
        self._most, self._least = most, least
        self._took: deque[float] = deque(maxlen=51)

    def took(self, seconds: float) -> None:
        """Takes note of a step."""
        self._took.append(seconds)

    @property
    def seconds(self) -> float:
        """How long to wait from now on."""
        if len(self._took) < _STEPS:
            return self._most
        return min(self._most, max(self._least, 10 * statistics.median(self._took)))


class Beats:
    """A rank's signs of life, sent by a thread until the block ends, or the process by an error.

    Args:
        client: the connection to the store, of which the thread has one of its own.
        rank: this one's.
        logs: the folder that takes what the rank was doing.
    """

    def __init__(self, client: StoreClient, rank: int, logs: Path) -> None:
        self._client, self._store = client, client.clone()
        self._rank, self._logs = rank, logs
        self._place = 0, "waiting"
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._send, daemon=True, name="beats")
        self._thread.start()

    def at(self, step: int, phase: str) -> None:
        """Says where the rank is from now on."""
        self._place = step, phase

    def __enter__(self) -> Beats:
        """What is raised within is noted to be of the step and phase that it is raised in."""
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Notes it; else ends the thread, which the end of Python would abort inside the store."""
        if error is not None:
            error.add_note(f"in phase {self._place[1]} of step {self._place[0]}")
            return
        self._over.set()
        self._thread.join(SECONDS)

    def _send(self) -> None:
        count, asked, host = 0, False, platform.node()
        with suppress(dist.DistError):  # the store has ended with the core, and so will this rank
            while not self._over.is_set():
                count += 1
                beat = msgspec.json.encode(Beat(count, *self._place, host)).decode()
                with self._client.asking():
                    self._store.set(beat_key(self._rank), beat)
                    wanted = self._store.check([STACKS])
                if wanted and not asked:
                    asked = True
                    write_stacks(self._logs, self._rank)
                self._over.wait(SECONDS)


def write_stacks(logs: Path, rank: int) -> None:
    """Writes where this process's threads are, and the last collectives of its groups.

    Args:
        logs: `stacks-rank-N.txt` there, with Python's stacks; `collectives-rank-N.json`, what
            torch's flight recorder has (gloo and NCCL).
        rank: N.
    """
    try:
        with (logs / f"stacks-rank-{rank}.txt").open("w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        (logs / f"collectives-rank-{rank}.json").write_bytes(collectives_trace())
    except OSError as error:
        log.warning("what this rank was doing is not written: %s", error)
