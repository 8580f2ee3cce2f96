"""`--elastic` as rank 0 sees it: who are members, and who would like to be."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from datetime import timedelta

import msgspec
import torch
import torch.distributed as dist

from psyche_fast.config import RunConfig
from psyche_fast.rank.elastic import meet_own, most_replicas
from psyche_fast.rank.epochs import Epochs, Place
from psyche_fast.rank.members import Epoch, Joiner, Leader, Refusal, Request, key, put, ranks_of
from psyche_fast.rank.trainer import Trainer
from psyche_fast.start.devices import check_processors, processor
from psyche_fast.start.elastic import ReplicaSidecars
from psyche_fast.start.store import read_processor

log = logging.getLogger("psyche_fast.core")


class Members:
    """The replicas of an elastic run.

    Args:
        config: the run, resolved.
        store: the one that rank 0 hosts.
        sidecars: those on this machine.
        device: rank 0's.
        tell: takes a line for the user, from any thread.

    Attributes:
        epochs: rank 0's own.
    """

    def __init__(
        self,
        config: RunConfig,
        store: dist.TCPStore,
        sidecars: ReplicaSidecars,
        device: torch.device,
        tell: Callable[[str], None],
    ) -> None:
        options = config.parallelism
        self._store, self._sidecars, self._device, self._tell = store, sidecars, device, tell
        self._size, self._at_start = options.ranks_per_replica, options.replicas
        self._timeout = timedelta(seconds=config.machines.timeout)
        place = Place(0, 0, self._size, most_replicas(options), sidecars.life(0))
        self._lost: dict[tuple[int, str], str] = {}
        dead = lambda: {**self._lost, **sidecars.gone()}  # noqa: E731
        leader = Leader(_clone(store), self._size, dead, tell)
        self.epochs = Epochs(_clone(store), place, config.machines.timeout, leader=leader)

    def begin(self, trainer: Trainer) -> None:
        """Waits for the replicas that are to be there from the start, and begins with them.

        Args:
            trainer: rank 0's own, ready to train.

        Raises:
            RuntimeError: some have not come in time.
        """
        meet_own(trainer)
        asked = {replica: key("join", replica) for replica in range(1, self._at_start)}
        try:
            self._store.wait(list(asked.values()), self._timeout)
        except dist.DistStoreError:
            late = [str(r) for r, name in asked.items() if not self._store.check([name])]
            raise RuntimeError(
                f"timed out waiting for the start of replica {', '.join(late)}"
            ) from None
        members = {0: self.epochs.place.life}
        members |= {replica: self._take(replica) for replica in asked}
        done = dict.fromkeys(ranks_of(members, self._size), 0)
        put(self._store, key(0), Epoch(number=0, members=members, done=done))
        self.epochs.begin()
        self._sidecars.has_begun = True

    @property
    def replicas(self) -> tuple[int, ...]:
        """The members, in order."""
        return self.epochs.members

    def joiner(self) -> tuple[int, str] | None:
        """A replica that would like to become a member, and its life; from the main thread."""
        self._sidecars.revive()
        for replica in range(1, self.epochs.replicas):
            if replica in self.replicas or not self._store.check([key("join", replica)]):
                continue
            life = self._take(replica)
            if (replica, life) in self._sidecars.gone():
                continue
            own, ranks = processor(self._device), ranks_of([replica], self._size)
            theirs = [read_processor(self._store, rank) for rank in ranks]
            try:
                check_processors([own] * ranks[0] + theirs)
            except ValueError as error:
                self._tell(f"replica {replica} cannot join: {error}")
                put(self._store, key("admitted", life), Refusal(refused=str(error)))
                continue
            return replica, life
        return None

    def now(self) -> tuple[list[int], Callable[[int], bool]]:
        """The members' ranks, and whether one of these has left since."""
        members = self.epochs.current.members

        def is_gone(rank: int) -> bool:
            replica = rank // self._size
            return self.epochs.current.members.get(replica) != members[replica]

        return ranks_of(members, self._size), is_gone

    def has(self, rank: int) -> bool:
        """Whether a rank is a member's."""
        return rank // self._size in self.replicas

    def lose(self, ranks: Sequence[int], how: str, store: dist.Store) -> bool:
        """Goes on without ranks that are stopped, cut off or stuck; from any thread.

        Args:
            ranks: those.
            how: for the user.
            store: a connection of the thread's own.

        Returns:
            whether that can be: not without rank 0's own replica.
        """
        replicas = {rank // self._size for rank in ranks}
        if 0 in replicas:
            return False
        epoch = self.epochs.current
        for replica in replicas & epoch.members.keys():
            self._lost[replica, epoch.members[replica]] = how
            self._sidecars.kill_replica(replica)
        store.set(key(epoch.number, "failed"), how)
        return True

    def joined(self, joiner: Joiner) -> None:
        """Takes note of one that has joined, or has not come that far."""
        if joiner.replica in self.replicas:
            self._sidecars.joined(joiner.replica)

    def end(self) -> None:
        """Ends replicas that are no members; from now on the others may end."""
        self._sidecars.end_all_but(self.replicas)

    def _take(self, replica: int) -> str:
        name = key("join", replica)
        request = msgspec.json.decode(self._store.get(name), type=Request)
        self._store.delete_key(name)
        return request.life


def _clone(store: dist.TCPStore) -> dist.Store:
    clone: dist.Store = store.clone()  # type: ignore[attr-defined]  # not in the stub
    return clone
