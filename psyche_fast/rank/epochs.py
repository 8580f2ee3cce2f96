"""Gathers between replicas of which some may end: in epochs, each with process groups of its own.

All that ranks of different replicas say to each other are gathers of equally many bytes from each,
in the same order on all of them. A thread of each rank carries them out, and what training waits
for is their results: it takes no notice of an epoch's end. When a gather fails, or a rank is told
so by the store, the thread reports how many it has the results of, and goes on in the epoch that
rank 0 publishes. What some have the result of and others have not is handed on to these first, so
that each result is all members' or nobody's, with what the dead have said in it; what nobody has
is gathered anew. The thread reports while a forward runs for minutes: who does not is gone.

Groups are made beside torch's default group, which is a replica's own, and dropped outside of any
`except`: a traceback keeps a group's sockets open, and with them waits of ranks that are not its
neighbours.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from psyche_fast.distro.gathers import Gathered, Gathers
from psyche_fast.errors import LOST_ANOTHER_RANK
from psyche_fast.rank.handover import Handover, receive
from psyche_fast.rank.members import (
    Epoch,
    Joiner,
    Leader,
    Report,
    key,
    put,
    ranks_of,
    read_epoch,
)
from psyche_fast.rank.sliced import SLICE, Ended, Group, first_line

_IDLE_SECONDS = 0.2
"""From one look at the store to the next where there is nothing to gather."""
_EVER = timedelta(days=7)
_LOOK_SECONDS = 0.01
_KEPT = 4
"""Results that are kept for ranks that have not got them: two members are at most three gathers
apart, for each of them waits for all ranks of one place or of all."""
T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """Where a rank of an elastic run is.

    Attributes:
        replica: its replica.
        place: its number in it.
        size: ranks of a replica.
        replicas: the most that there may be.
        life: of the replica; one that comes back has another.
    """

    replica: int
    place: int
    size: int
    replicas: int
    life: str

    @property
    def rank(self) -> int:
        """Among the ranks of all replicas."""
        return self.replica * self.size + self.place


@dataclass
class _Gather:
    number: int
    everyone: bool
    sent: Tensor | Callable[[], Tensor]
    future: Future[Gathered] = field(default_factory=Future)
    computed: Future[Tensor] | None = None
    state: Handover | None = None
    welcomes: bool = False  # an epoch with a new member follows


class LeftOut(RuntimeError):
    """The others go on without this replica."""


class Epochs(Gathers):
    """One rank's part in the gathers of an elastic run.

    Args:
        store: a connection for the thread's own use.
        place: where the rank is.
        timeout: how long a gather may take.
        asking: entered around each question to the store.
        leader: decides; of rank 0.
        joins: whether the run has begun without this replica.

    Attributes:
        place: as given.
        joins: as given.
        admitted: of one that joins: its first operation, and a member's state.
    """

    def __init__(
        self,
        store: dist.Store,
        place: Place,
        timeout: float,
        asking: Callable[[], AbstractContextManager[None]] = nullcontext,
        leader: Leader | None = None,
        *,
        joins: bool = False,
    ) -> None:
        assert (leader is not None) == (place.rank == 0)
        self._store, self.place, self._asking, self._leader = store, place, asking, leader
        self.replicas, self.size, self.rank = place.replicas, place.size, place.rank
        self._timeout = timedelta(seconds=timeout)
        self._queue: queue.SimpleQueue[_Gather | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._begun = self._done = 0
        self._error: Exception | None = None
        self._current: _Gather | None = None
        self._welcome: _Gather | None = None
        self._kept: deque[tuple[_Gather, Gathered]] = deque(maxlen=_KEPT)
        self._groups: dict[bool, Group] = {}  # of the same place, and of all
        self._busy: list[Group] = []
        self.joins, self._moved, self._has_state = joins, False, not joins
        self._epoch: Epoch | None = None
        self.epoch = 0
        self.admitted: Future[tuple[int, Mapping[str, Tensor]]] = Future()
        self._member: Future[None] = Future()
        self._thread: threading.Thread | None = None
        self._computing = ThreadPoolExecutor(1, "opinions")

    # For the thread that trains.

    def begin(self) -> None:
        """Begins; waits until this replica is a member, or, if it joins, for nothing.

        Raises:
            RuntimeError: the members do not come together.
        """
        self._thread = threading.Thread(target=self._run, daemon=True, name="epochs")
        self._thread.start()
        if not self.joins:
            self._member.result()

    @property
    def members(self) -> tuple[int, ...]:
        """The replicas of the epoch, in order."""
        return tuple(sorted(self.current.members))

    @property
    def current(self) -> Epoch:
        """The epoch."""
        assert self._epoch is not None, "`begin` comes first"
        return self._epoch

    def gather(
        self, sent: Tensor | Callable[[], Tensor], *, everyone: bool = False
    ) -> Future[Gathered]:
        """See `Gathers`; carried out by the thread."""
        return self._submit(everyone, sent)

    def welcome(self, state: Handover | None = None, joiner: Joiner | None = None) -> None:
        """Between steps: takes part while a replica joins, and waits until it has, or is gone.

        Args:
            state: on the ranks of replica 0, what it has.
            joiner: on rank 0, who joins.
        """
        nothing = torch.zeros(1, dtype=torch.uint8)
        self._submit(True, nothing, state=state, joiner=joiner, welcomes=True).result()

    def close(self) -> None:
        """Meets all ranks, if they still can, and ends."""
        nothing = torch.zeros(1, dtype=torch.uint8)
        with self._lock:
            failed = self._error is not None
        if not failed:
            self._queue.put(_Gather(-1, True, nothing))
            self._queue.put(None)
        assert self._thread is not None
        self._thread.join()

    def _submit(
        self,
        everyone: bool,
        sent: Tensor | Callable[[], Tensor],
        *,
        state: Handover | None = None,
        joiner: Joiner | None = None,
        welcomes: bool = False,
    ) -> Future[Gathered]:
        with self._lock:
            if self._error is not None:
                raise self._error
            self._begun += 1
            if joiner is not None:
                assert self._leader is not None
                self._leader.admit(joiner, self._begun)
            gather = _Gather(self._begun, everyone, sent, state=state, welcomes=welcomes)
            self._queue.put(gather)
        return gather.future

    # The thread that gathers.

    def _run(self) -> None:
        try:
            epoch = self._first_epoch()
            ended = self._form(epoch)
            while ended is not None or (ended := self._work_off()) is not None:
                epoch = self._next_epoch(epoch, ended)
                ended = self._form(epoch)
        except Exception as error:  # whoever waits raises it
            self._give_up(error)
        self._groups.clear()

    def _give_up(self, error: Exception) -> None:
        with self._lock:
            self._error = error
        waiting: list[Future[None] | Future[Gathered] | Future[tuple[int, Mapping[str, Tensor]]]]
        waiting = [self._member, self.admitted]
        waiting += [g.future for g in (self._current, self._welcome) if g is not None]
        while not self._queue.empty():
            gather = self._queue.get()
            if gather is not None:
                waiting.append(gather.future)
        for future in waiting:
            if not future.done():
                future.set_exception(error)

    def _first_epoch(self) -> Epoch:
        if self._has_state:
            return self._wait_for(key(0))
        epoch = self._wait_for(key("admitted", self.place.life))
        with self._lock:
            self._begun = self._done = epoch.done[self.place.rank]
        return epoch

    def _work_off(self) -> Ended | None:
        """Gathers until the epoch is over; None when all is done."""
        while True:
            if self._current is None:
                try:
                    self._current = self._queue.get(timeout=_IDLE_SECONDS)
                except queue.Empty:
                    self._sweep()
                    if self._is_told():
                        return Ended("others say so")
                    continue
                if self._current is None:
                    return None
            gather = self._current
            sent = self._sent(gather)
            if isinstance(sent, Ended):
                return sent
            group = self._groups[gather.everyone]
            rows, ended = group.all_gather(sent, self._timeout, gather.number)
            if gather.number < 0:  # the last one, of which nothing is wanted but to have met
                return None
            if ended is not None:
                return ended
            assert rows is not None
            self._finish(gather, Gathered(group.ranks, rows))
            if gather.welcomes:
                return Ended("a replica joins")

    def _sent(self, gather: _Gather) -> Tensor | Ended:
        """What this rank sends; where that is to be computed, the store is looked at meanwhile."""
        if isinstance(gather.sent, Tensor):
            return gather.sent
        if gather.computed is None:
            gather.computed = self._computing.submit(gather.sent)
        while not wait([gather.computed], SLICE.total_seconds()).done:
            if self._is_told():
                return Ended("others say so")
        return gather.computed.result()

    def _finish(self, gather: _Gather, gathered: Gathered) -> None:
        assert gather.number == self._done + 1
        self._done, self._current, self._moved = gather.number, None, True
        self._kept.append((gather, gathered))
        if gather.welcomes:
            self._welcome = gather
        else:
            gather.future.set_result(gathered)

    def _next_epoch(self, epoch: Epoch, ended: Ended) -> Epoch:
        """Reports, and waits for what follows."""
        self._drop_groups()
        with self._lock:
            begun = self._begun
        report = Report(
            done=self._done, begun=begun, late=ended.late, moved=self._moved,
            has_state=self._has_state,
        )  # fmt: skip
        mine, failed = key(epoch.number, "report", self.place.rank), key(epoch.number, "failed")
        self._ask(lambda: put(self._store, mine, report))
        self._ask(lambda: self._store.set(failed, ended.why))
        if self._leader is not None:
            return self._leader.next(epoch)
        return self._wait_for(key(epoch.number + 1))

    def _form(self, epoch: Epoch) -> Ended | None:
        """Meets the members of an epoch, and brings those up to date that are behind.

        Raises:
            LeftOut: this replica is none of them.
        """
        place = self.place
        if epoch.members.get(place.replica) != place.life:
            raise LeftOut(
                f"{LOST_ANOTHER_RANK}: replica {place.replica} had not answered in time, and the "
                f"others go on without it"
            )
        self._epoch, self._moved, self.epoch = epoch, False, epoch.number
        everyone = ranks_of(epoch.members, place.size)
        same = [rank for rank in everyone if rank % place.size == place.place]
        for of_all, ranks, name in (False, same, f"place{place.place}"), (True, everyone, "all"):
            if of_all and same == everyone:
                self._groups[True] = self._groups[False]
                continue
            group = self._connect(f"{epoch.number}/{name}", ranks)
            if isinstance(group, Ended):
                return group
            self._groups[of_all] = group
        ended = self._hand_on(epoch) or self._admit(epoch)
        if ended is not None:
            return ended
        if self._welcome is not None:
            gather, self._welcome = self._welcome, None
            gather.future.set_result(self._kept[-1][1])
            gather.state = None
        if not self._member.done():
            self._member.set_result(None)
        return None

    def _connect(self, name: str, ranks: Sequence[int]) -> Group | Ended:
        store = dist.PrefixStore(f"elastic/groups/{name}", self._store)
        try:
            return Group(store, ranks, self.place.rank, self._is_told)
        except RuntimeError as error:
            return Ended(f"the members do not come together: {first_line(error)}")

    def _hand_on(self, epoch: Epoch) -> Ended | None:
        """Sees to it that each result is all members' or nobody's."""
        done = epoch.done
        for number in range(min(done.values()) + 1, max(done.values()) + 1):
            for everyone in (False, True):
                ranks = self._groups[everyone].ranks
                has = [rank for rank in ranks if done[rank] >= number]
                givers = [rank for rank in has if rank // self.place.size != epoch.joins]
                if not givers or len(has) == len(ranks):
                    continue
                ended = self._hand_on_one(number, everyone, givers[0])
                if ended is not None:
                    return ended
        return None

    def _hand_on_one(self, number: int, everyone: bool, giver: int) -> Ended | None:
        group = self._groups[everyone]
        header = torch.full((3 + self.place.size * self.place.replicas,), -1)
        content = torch.empty(0, dtype=torch.uint8)
        if self.place.rank == giver:
            gather, gathered = next(k for k in self._kept if k[0].number == number)
            if gather.everyone == everyone:
                content = gathered.rows.reshape(-1)
                header[: 3 + len(gathered.ranks)] = torch.tensor(
                    [1, len(gathered.ranks), len(content), *gathered.ranks]
                )
        ended = group.broadcast(header, giver, self._timeout)
        if ended is not None or header[0] < 0:
            return ended
        senders = header[3 : 3 + int(header[1])].tolist()
        if self.place.rank != giver:
            content = torch.empty(int(header[2]), dtype=torch.uint8)
        ended = group.broadcast(content, giver, self._timeout)
        if ended is None and self._done == number - 1:
            if self._current is None:
                self._current = self._queue.get()  # all have begun what one has done
            assert self._current is not None and self._current.everyone == everyone
            self._finish(self._current, Gathered(senders, content.view(len(senders), -1)))
        return ended

    def _admit(self, epoch: Epoch) -> Ended | None:
        """Hands the state of replica 0 to the one that joins; the others wait."""
        if epoch.joins is None:
            return None
        size, own = self.place.size, self.place
        if own.replica in (0, epoch.joins):
            pair = [own.place, epoch.joins * size + own.place]
            group = self._connect(f"{epoch.number}/state{own.place}", pair)
            if isinstance(group, Ended):
                return group
            ended = self._hand_over(group, pair[0], epoch.operation)
            if ended is not None:
                if group.is_busy:
                    self._busy.append(group)
                return ended
        ready = torch.zeros(1, dtype=torch.uint8)
        # As long as the state takes: those who hand it over look after the time.
        _, ended = self._groups[True].all_gather(ready, _EVER, None)
        return ended

    def _hand_over(self, group: Group, giver: int, operation: int) -> Ended | None:
        def broadcast(content: Tensor) -> Ended | None:
            return group.broadcast(content, giver, self._timeout)

        if self.place.replica == 0:
            assert self._welcome is not None and self._welcome.state is not None
            return self._welcome.state.send(broadcast)
        state, ended = receive(broadcast)
        if ended is None:
            self._has_state = True
            self.admitted.set_result((operation, state))
        return ended

    # What remains of an epoch.

    def _drop_groups(self) -> None:
        self._busy += [group for group in self._groups.values() if group.is_busy]
        self._groups.clear()
        self._sweep()

    def _sweep(self) -> None:
        """Lets go of groups that have nothing under way any more: others would be waited for."""
        self._busy = [group for group in self._busy if group.is_busy]

    # The store.

    def _ask(self, question: Callable[[], T]) -> T:
        """Asks the store.

        Raises:
            RuntimeError: it is gone.
        """
        with self._asking():
            try:
                return question()
            except dist.DistError as error:
                lost = f"{LOST_ANOTHER_RANK}: the core's store: {first_line(error)}"
        raise RuntimeError(lost)

    def _is_told(self) -> bool:
        assert self._epoch is not None
        failed = key(self._epoch.number, "failed")
        return self._ask(lambda: self._store.check([failed]))

    def _wait_for(self, name: str) -> Epoch:
        while not self._ask(lambda: self._store.check([name])):
            time.sleep(_LOOK_SECONDS)
            self._sweep()
        return read_epoch(self._ask(lambda: bytes(self._store.get(name))))
