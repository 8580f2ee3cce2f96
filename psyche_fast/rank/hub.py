"""What replicas in one process send each other, whose turns come one after the other."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from psyche_fast.distro.gathers import Gathered, Gathers
from psyche_fast.methods import Replica
from psyche_fast.methods.exchanges import Arrived, InProcess, traffic
from psyche_fast.methods.replica import Faults


@dataclass
class _Gather:
    """What has been handed in, by rank, and what all get once everybody has."""

    sent: dict[int, Tensor | Callable[[], Tensor]] = field(default_factory=dict)
    result: Future[Gathered] = field(default_factory=Future)


class Hub:
    """What replicas in one process send each other, whose turns come one after the other.

    Args:
        replicas: how many there are.
    """

    def __init__(self, replicas: int) -> None:
        self.replicas = replicas
        self._gathers: defaultdict[int, _Gather] = defaultdict(_Gather)
        self._done = 0
        self._rounds: defaultdict[object, _Board] = defaultdict(partial(_Board, replicas))

    def gather(
        self, number: int, rank: int, sent: Tensor | Callable[[], Tensor]
    ) -> Future[Gathered]:
        """A rank's part of a gather, which is as many others' in their own order."""
        future = self._gathers[number].result
        self._gathers[number].sent[rank] = sent
        while len(self._gathers[self._done].sent) == self.replicas:
            gather = self._gathers.pop(self._done)
            self._done += 1
            first = gather.sent[0]
            if callable(first):  # what ranks say of what all have got, which is the same here
                rows = first().repeat(self.replicas, 1)
            else:
                rows = torch.stack([gather.sent[r] for r in range(self.replicas)])  # type: ignore[misc]
            gather.result.set_result(Gathered(range(self.replicas), rows))
        return future

    def peers(self, rank: int) -> Peers | None:
        """The others, for a rank; None where there are none."""
        return Peers(self, rank) if self.replicas > 1 else None

    def board(self, what: object) -> _Board:
        """Where the replicas of a method leave their messages."""
        return self._rounds[what]


class Peers(Gathers):
    """The other replicas of the process, for one of them.

    Args:
        hub: of all.
        rank: this one.
    """

    def __init__(self, hub: Hub, rank: int) -> None:
        self.replicas, self.size, self.rank, self.epoch = hub.replicas, 1, rank, 0
        self._hub, self._number = hub, 0

    def gather(
        self, sent: Tensor | Callable[[], Tensor], *, everyone: bool = False
    ) -> Future[Gathered]:
        """See `Gathers`: done once all replicas have had their turns."""
        number, self._number = self._number, self._number + 1
        return self._hub.gather(number, self.rank, sent)

    def rounds(self, replica: Replica) -> Here:
        """The exchanges of a method's replica."""
        return Here(replica, self._hub.board("method"))


class _Board:
    """A method's replicas, and their messages under way by the number of their round."""

    def __init__(self, replicas: int) -> None:
        self._count = replicas
        self._replicas: dict[int, Replica] = {}
        self._sent: defaultdict[int, dict[int, Tensor]] = defaultdict(dict)
        self._arrived: dict[int, tuple[Arrived, set[int]]] = {}

    def join(self, replica: Replica) -> None:
        self._replicas[replica.replica] = replica

    def put(self, number: int, replica: int, message: Tensor) -> None:
        self._sent[number][replica] = message

    def take(self, number: int, replica: int) -> Arrived:
        """What a replica receives of the oldest messages that it has not received yet."""
        if number not in self._arrived:
            sent = self._sent.pop(number)
            assert len(sent) == self._count, "all have their turns before one receives"
            members = range(self._count)
            exchange = InProcess([self._replicas[r] for r in members])
            self._arrived[number] = exchange.deliver([sent[r] for r in members], at=0), set()
        arrived, takers = self._arrived[number]
        takers.add(replica)
        if len(takers) == self._count:
            del self._arrived[number]
        return arrived


class Here:
    """`Rounds` of a replica whose peers are in this process.

    Args:
        replica: this one.
        board: what all of them share.

    Attributes:
        bytes_sent: as of `Rounds`.
        bytes_received: likewise.
    """

    def __init__(self, replica: Replica, board: _Board) -> None:
        self._replica, self._board = replica, board
        self._sent = self._received = 0
        self.bytes_sent = self.bytes_received = 0
        board.join(replica)

    def send(self) -> int:
        """As of `Rounds`."""
        message = self._replica.send()
        if message is None:
            return 0
        self._put(message)
        form, _ = self._replica.flight()
        up, down = traffic(form, self._replica.replica, self._replica.replicas)
        self.bytes_sent += up
        self.bytes_received += down
        return up

    def receive(self) -> Faults:
        """As of `Rounds`; nothing is damaged on the way."""
        refused: Faults = {}
        while self._replica.due():
            arrived = self._board.take(self._received, self._replica.replica)
            refused |= self._replica.receive(arrived.messages, arrived.leave_out)
            self._received += 1
        return refused

    def settle(self) -> None:
        """As of `Rounds`: nothing is under way."""

    def resume(self) -> None:
        """As of `Rounds`."""
        for message in self._replica.in_flight():
            self._put(message)

    def _put(self, message: Tensor) -> None:
        self._board.put(self._sent, self._replica.replica, message)
        self._sent += 1
