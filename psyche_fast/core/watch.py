"""Ends a run in which a rank is stopped, cut off or stuck, and says which one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import torch.distributed as dist

from psyche_fast.config import RunConfig
from psyche_fast.core.elastic import Members
from psyche_fast.core.ranks import Ranks
from psyche_fast.core.status import Status
from psyche_fast.metrics import PhaseTimer
from psyche_fast.rank.beats import SECONDS, STACKS, Beat, Patience, beat_key, write_stacks
from psyche_fast.start.signals import exit_now

_LONG = {"data", "send", "checkpoint", "join", "evaluate", "sample", None}
"""Phases of rank 0's in which others may have to wait: each has limits of its own."""
_STOPPED = 5.0
"""Seconds between two looks, from which on nothing can be said of others."""


def watching(
    ranks: Ranks,
    config: RunConfig,
    timer: PhaseTimer,
    logs: Path,
    members: Members | None = None,
    status: Status | None = None,
) -> Watch:
    """The watch over a run.

    Args:
        ranks: the others.
        config: the run, resolved.
        timer: says what rank 0 does.
        logs: takes what the ranks were doing.
        members: of an elastic run, which goes on without the rank that is named.
        status: is told of the signs of life.
    """
    most = config.machines.timeout
    # A new shape is compiled anew, while nothing is wrong.
    patience = Patience(most, most) if config.model.compile else Patience(most)
    store = ranks.store.clone()  # type: ignore[attr-defined]  # not in the stub
    world = config.parallelism.world_size
    if members is not None:
        world = members.epochs.replicas * members.epochs.size
    kill = ranks.sidecars.kill
    return Watch(store, world, timer, patience, Patience(most), logs, kill, members, status)


class Watch:
    """Compares the ranks' signs of life in a thread, while a block runs.

    Args:
        store: a connection of the thread's own.
        ranks: of the run.
        timer: says what rank 0 does.
        patience: how long a step may take.
        silence: how long a rank may be silent.
        logs: takes what the ranks were doing.
        kill: ends those of this machine.
        members: of an elastic run, which goes on without the rank that is named.
        status: is told of the signs of life.
    """

    def __init__(
        self,
        store: dist.Store,
        ranks: int,
        timer: PhaseTimer,
        patience: Patience,
        silence: Patience,
        logs: Path,
        kill: Callable[[], None],
        members: Members | None = None,
        status: Status | None = None,
    ) -> None:
        self._status = status
        self._store, self._ranks, self._timer = store, range(1, ranks), timer
        self._patience, self._silence = patience, silence
        self._logs, self._kill, self._members = logs, kill, members
        self._step, self._since = 0, time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watch")

    def begins(self, step: int) -> None:
        """Says that rank 0 begins a step."""
        now = time.monotonic()
        if self._step:
            self._patience.took(now - self._since)
            self._silence.took(now - self._since)
        self._step, self._since = step, now

    def __enter__(self) -> Watch:
        """Begins to watch, where there is somebody to wait for or to tell."""
        if self._ranks or self._status is not None:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Ends; whatever goes on is then for others to limit."""
        self._over.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _watch(self) -> None:
        heard: dict[int, tuple[Beat, float]] = {}
        keys = {rank: beat_key(rank) for rank in self._ranks}
        busy_since = looked = time.monotonic()
        while not self._over.wait(SECONDS):
            now, before = time.monotonic(), looked
            looked = now
            if now - before > _STOPPED:  # it is this process that was stopped
                heard.clear()
                busy_since = now
            for rank, key in keys.items():
                if self._members is not None and not self._members.has(rank):
                    heard.pop(rank, None)
                    continue
                if not self._store.check([key]):
                    continue
                beat = msgspec.json.decode(self._store.get(key), type=Beat)
                if rank not in heard or heard[rank][0].count != beat.count:
                    heard[rank] = beat, now
            if self._status is not None:
                self._status.write(self._step, self._since, self._timer.current, heard)
            if not self._ranks:  # nobody to wait for
                continue
            for rank, (beat, at) in heard.items():
                if now - at > self._silence.seconds:
                    what = (
                        f"rank {rank} on {beat.host} has not been heard of for {now - at:.0f} s "
                        f"(it was at step {beat.step}, {beat.phase}): it is stopped or cut off"
                    )
                    if not self._goes_on_without([rank], what):
                        return self._end(what)
            if self._timer.current in _LONG:
                busy_since = now
            if now - max(busy_since, self._since) > self._patience.seconds:
                late, what = self._slowest({rank: beat for rank, (beat, _) in heard.items()})
                if not self._goes_on_without(late, what):
                    return self._end(what)
                busy_since = now

    def _goes_on_without(self, ranks: list[int], what: str) -> bool:
        """Has an elastic run leave ranks out; whether it can."""
        members = self._members
        return bool(ranks) and members is not None and members.lose(ranks, what, self._store)

    def _slowest(self, beats: dict[int, Beat]) -> tuple[list[int], str]:
        """The ranks that others wait for, and what to say of them."""
        phase = self._timer.current
        usual = f"step {self._step} has taken more than {self._patience.seconds:.0f} s"
        behind = [r for r, b in beats.items() if (b.step, b.phase) != (self._step, phase)]
        late = [r for r in behind if beats[r].step <= self._step]
        who = "; ".join(
            f"rank {r} on {beats[r].host} is at step {beats[r].step}, {beats[r].phase}"
            for r in late[:8]
        )
        said = f"{usual}: rank 0 is in {phase}" + (f", {who}" if who else ", and so are all others")
        return late, said

    def _end(self, what: str) -> None:
        with_stacks = f"{self._logs}/stacks-rank-*.txt say where the ranks were"
        self._store.set(STACKS, "")
        write_stacks(self._logs, 0)
        self._over.wait(2 * SECONDS)  # until they have written theirs
        if self._over.is_set():
            return  # it has gone on after all, or ended otherwise
        self._kill()
        if self._status is not None:
            self._status.end(f"failed: {what}")
        exit_now(1, f"error: {what} (--timeout); {with_stacks}")
