"""Who takes part in an elastic run: what is said of it through the store, and who decides.

Members are replicas. Between two changes of them lies an epoch, which has process groups of its
own (`rank.epochs`). Below the store's prefix `elastic`: `N` is epoch N, `N/failed` says that it is
over, `N/report/RANK` how far a rank has come in it, `join/REPLICA` is a replica that would like to
take part, and `admitted/LIFE` the answer to it. Rank 0 decides: it hosts the store, and where it
is gone nobody goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import msgspec
import torch.distributed as dist

WINDOW = 1.0
"""Seconds in which ranks that are alive say so once an epoch is over: their threads do, whatever
their training does."""
_LOOK_SECONDS = 0.005
_TRIES = 2
"""How often the same members may fail to come together before one of them has to go."""


class Epoch(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A time with the same members."""

    number: int
    members: dict[int, str]
    """By replica, which of its lives: one that comes back is another."""
    done: dict[int, int]
    """By rank, how many gathers it has the result of."""
    joins: int | None = None
    """The replica that has not been a member before, if any."""
    operation: int = 0
    """The first operation that is for it."""


class Report(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How far a rank has come when an epoch is over for it."""

    done: int
    """Gathers of which it has the result."""
    begun: int
    """Gathers that its training has asked for."""
    late: int | None
    """The gather for which it has waited too long, if that is why."""
    moved: bool
    """Whether any gather was done in this epoch."""
    has_state: bool
    """Whether it has what a member trains."""


class Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A replica that has loaded its model and would like to take part."""

    life: str


class Refusal(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Why a replica cannot take part."""

    refused: str


@dataclass(frozen=True)
class Joiner:
    """A replica that takes part from a step on.

    Attributes:
        replica: which.
        life: of it.
        operation: the first that is for it.
    """

    replica: int
    life: str
    operation: int


def key(*parts: object) -> str:
    """A key of the store."""
    return "/".join(["elastic", *map(str, parts)])


def put(store: dist.Store, name: str, value: msgspec.Struct) -> None:
    """Leaves something for the other ranks."""
    store.set(name, msgspec.json.encode(value).decode())


def read_epoch(content: bytes) -> Epoch:
    """What `put` left of an epoch.

    Raises:
        ValueError: it is a refusal, or another version's.
    """
    try:
        if b'"refused"' in content:
            raise ValueError(msgspec.json.decode(content, type=Refusal).refused)
        return msgspec.json.decode(content, type=Epoch)
    except msgspec.DecodeError as error:
        raise ValueError(f"the store's epoch is another version's: {error}") from error


def ranks_of(members: Collection[int], size: int) -> list[int]:
    """The ranks of replicas of `size` ranks each, in order."""
    return [replica * size + place for replica in sorted(members) for place in range(size)]


class Leader:
    """Decides, in rank 0's thread, who takes part when an epoch is over.

    Args:
        store: a connection of that thread's own.
        size: ranks of a replica.
        dead: gives the replicas, by number and life, that are known to have ended, and how.
        tell: takes a line for the user, from any thread.
    """

    def __init__(
        self,
        store: dist.Store,
        size: int,
        dead: Callable[[], Mapping[tuple[int, str], str]],
        tell: Callable[[str], None],
    ) -> None:
        self._store, self._size, self._dead, self._tell = store, size, dead, tell
        self._joiner: tuple[Joiner, int] | None = None
        self._idle = 0

    def admit(self, joiner: Joiner, gather: int) -> None:
        """Has a replica become a member after a gather that all members take part in."""
        self._joiner = joiner, gather

    def next(self, epoch: Epoch) -> Epoch:
        """Collects what the members of an epoch report, and publishes the one that follows.

        Raises:
            RuntimeError: rank 0's own replica cannot go on.
        """
        reports = self._collect(epoch)
        following = self._decide(epoch, reports)
        put(self._store, key(following.number), following)
        if following.joins is not None:
            put(self._store, key("admitted", following.members[following.joins]), following)
        for rank in ranks_of(epoch.members, self._size):
            self._store.delete_key(key(epoch.number - 1, "report", rank))
        stay, dead = ", ".join(map(str, sorted(following.members))), self._dead()
        for replica in sorted(epoch.members.keys() - following.members.keys()):
            how = dead.get((replica, epoch.members[replica]), "it does not answer")
            self._tell(f"replica {replica} is gone ({how}); going on with {stay}")
        if following.joins is not None:
            self._tell(f"replica {following.joins} joins; going on with {stay}")
        return following

    def _collect(self, epoch: Epoch) -> dict[int, Report]:
        """The reports that come in time; at once where all have come that can."""
        ranks = ranks_of(epoch.members, self._size)
        reports: dict[int, Report] = {}
        until = time.monotonic() + WINDOW
        while True:
            dead = self._dead()
            for rank in ranks:
                name = key(epoch.number, "report", rank)
                if rank not in reports and self._store.check([name]):
                    reports[rank] = msgspec.json.decode(self._store.get(name), type=Report)
            missing = {rank // self._size for rank in ranks if rank not in reports}
            if all((replica, epoch.members[replica]) in dead for replica in missing):
                return reports
            if time.monotonic() > until:
                return reports
            time.sleep(_LOOK_SECONDS)

    def _decide(self, epoch: Epoch, reports: Mapping[int, Report]) -> Epoch:
        dead = self._dead()
        members = {
            replica: life
            for replica, life in epoch.members.items()
            if (replica, life) not in dead
            and all(
                rank in reports and reports[rank].has_state
                for rank in ranks_of([replica], self._size)
            )
        }
        late = max((r.late for r in reports.values() if r.late is not None), default=0)
        for rank, report in reports.items():
            if report.begun < late:  # its training hangs: the thread that reports does not
                members.pop(rank // self._size, None)
        moved = any(report.moved for report in reports.values())
        self._idle = 0 if moved or members != epoch.members else self._idle + 1
        if self._idle >= _TRIES:  # all see the store, but some do not see each other
            members.pop(max(members))
            self._idle = 0
        if 0 not in members:
            raise RuntimeError("a rank of replica 0, which leads, did not answer within --timeout")
        done = {rank: reports[rank].done for rank in ranks_of(members, self._size)}
        joins, operation = None, 0
        if self._joiner is not None and max(done.values()) >= self._joiner[1]:
            joiner, _ = self._joiner
            self._joiner = None
            if (joiner.replica, joiner.life) not in dead:
                joins, operation = joiner.replica, joiner.operation
                members[joins] = joiner.life
                done |= dict.fromkeys(ranks_of([joins], self._size), max(done.values()))
        return Epoch(
            number=epoch.number + 1, members=members, done=done, joins=joins, operation=operation
        )
