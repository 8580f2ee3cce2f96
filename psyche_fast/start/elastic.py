"""The sidecars of an elastic run on the core's machine: a replica that dies is started again."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from psyche_fast.errors import SidecarFailed, describe_exit
from psyche_fast.start.parent import LIFE
from psyche_fast.start.spawn import Child, Sidecars, obituary

log = logging.getLogger("psyche_fast.core")

_LONGEST_PAUSE = 60.0


def new_life() -> str:
    """A name for one life of a replica."""
    return os.urandom(8).hex()


@dataclass
class ReplicaSidecars(Sidecars):
    """`Sidecars` of which those of replica 0 alone must not end; a replica's ranks end together.

    Attributes:
        size: ranks of a replica.
        tell: takes a line for the user.
        lives: of each replica here, which life it is in.
        has_begun: whether training has; until then every end is the run's.
    """

    size: int = 1
    tell: Callable[[str], None] = print
    lives: dict[int, str] = field(default_factory=dict)
    has_begun: bool = False
    _arguments: dict[int, tuple[int | None, Path | None]] = field(default_factory=dict)
    _gone: dict[tuple[int, str], str] = field(default_factory=dict)
    _due: dict[int, float] = field(default_factory=dict)
    _deaths: dict[int, int] = field(default_factory=dict)
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def spawn(self, rank: int, device_index: int | None, log: Path | None) -> None:
        """See `Sidecars.spawn`."""
        self._arguments[rank] = device_index, log
        self.environment[LIFE] = self.life(rank // self.size)
        with self._lock:
            super().spawn(rank, device_index, log)

    def life(self, replica: int) -> str:
        """The life that a replica is in."""
        return self.lives.setdefault(replica, new_life())

    def gone(self) -> Mapping[tuple[int, str], str]:
        """How replicas, by number and life, have ended."""
        with self._lock:
            return dict(self._gone)

    def joined(self, replica: int) -> None:
        """Takes note that a replica is a member again: its next death is a first one."""
        self._deaths.pop(replica, None)

    def revive(self) -> None:
        """Starts replicas again whose pause is over; from the main thread, between steps."""
        now = time.monotonic()
        with self._lock:
            due = [replica for replica, at in self._due.items() if at <= now]
            for replica in due:
                del self._due[replica]
                self.lives[replica] = new_life()
        for replica in due:
            for rank, (device, log_file) in sorted(self._arguments.items()):
                if rank // self.size == replica:
                    self.spawn(rank, device, log_file)

    def kill_replica(self, replica: int) -> None:
        """Ends one that does not answer, if it is here; from any thread."""
        with self._lock:
            for child in self._children:
                if child.rank // self.size == replica and child.process.poll() is None:
                    child.process.kill()

    def end_all_but(self, members: Collection[int]) -> None:
        """Ends replicas that have not become members, and starts none any more."""
        self._closing.set()
        with self._lock:
            self._due.clear()
            for replica in {child.rank // self.size for child in self._children} - {*members}:
                self._end(replica)

    def join(self, timeout: float) -> None:
        """See `Sidecars.join`; what other replicas end with is not the run's."""
        try:
            super().join(timeout)
        except SidecarFailed as error:
            failed = [c for c in self._children if c.process.poll() != 0]
            if any(child.rank // self.size == 0 for child in failed):
                raise
            log.warning("%s", error)

    def _are_fatal(self, dead: list[Child]) -> bool:
        replicas = {child.rank // self.size for child in dead}
        if not self.has_begun or 0 in replicas:
            return True
        with self._lock:
            for replica in replicas:
                self._bury(replica, next(c for c in dead if c.rank // self.size == replica))
        return False

    def _bury(self, replica: int, child: Child) -> None:
        how = f"rank {child.rank}: {describe_exit(child.process.wait())}"
        log.warning("%s", obituary(child))
        self._end(replica)
        self._gone[replica, self.lives[replica]] = how
        before = self._deaths.get(replica, 0)
        self._deaths[replica] = before + 1
        pause = min(2.0**before, _LONGEST_PAUSE)
        self._due[replica] = time.monotonic() + pause
        if before:
            when = f"once more in {pause:g} s"
            self.tell(f"replica {replica} did not come back ({how}; {child.log}); {when}")

    def _end(self, replica: int) -> None:
        for child in self._children:
            if child.rank // self.size == replica and child.process.poll() is None:
                child.process.kill()
        for child in self._children:
            if child.rank // self.size == replica:
                child.process.wait()
        self._children = [c for c in self._children if c.rank // self.size != replica]
