"""A replica among others: messages sent, waited for, and refused by all or by none."""

from __future__ import annotations

import logging
from collections import deque

import torch
import torch.distributed as dist

from psyche_fast.distro import exchange
from psyche_fast.distro.message import hash_bits
from psyche_fast.methods.exchanges import Flight, Link
from psyche_fast.methods.hierarchy import Level
from psyche_fast.methods.owners import are_owned
from psyche_fast.methods.replica import Faults, Replica
from psyche_fast.sharding import local_tensor

log = logging.getLogger(__name__)


class Rounds:
    """The exchanges of a replica; a collective of all replicas in the order of their steps.

    What has come is checked and agreed on as soon as it has, whatever goes on meanwhile. Where a
    result is due some steps after it was sent, nobody waits for the others then, unless the link
    is late.

    Args:
        replica: this rank's, after whose local steps `exchange` is called.
        group: the ranks with the other replicas, of which this rank's counterparts where replicas
            are sharded; None where there are none.

    Attributes:
        bytes_sent: what this rank has handed to exchanges: its message to an all-gather, a copy for
            each other replica of what owners get and send.
        bytes_received: what has come from other replicas.

    Raises:
        ValueError: the replicas' methods or shared parameters differ at the start.
    """

    def __init__(self, replica: Replica | Level, group: dist.ProcessGroup | None) -> None:
        self._replica, self._group = replica, group
        self._pending: deque[Flight] = deque()
        self.bytes_sent = self.bytes_received = 0
        self._compare()
        owned = are_owned(replica.method, replica.replicas)
        self._link = Link(group, replica.inside, owned=owned)

    def exchange(self) -> Faults:
        """After a local step: `send`, and then `receive`."""
        self.send()
        return self.receive()

    @torch.no_grad()
    def send(self) -> int:
        """After a local step: begin to send what it ends; its bytes, 0 where there is nothing."""
        message = self._replica.send()
        if message is None:
            return 0
        flight = Flight(self._link, *self._replica.flight(), message)
        self._pending.append(flight)
        self.bytes_sent += flight.bytes_sent
        self.bytes_received += flight.bytes_received
        return flight.bytes_sent

    @torch.no_grad()
    def receive(self) -> Faults:
        """Apply what is due, which is waited for.

        Returns:
            What has been refused, by replica; a warning has been written of each.
        """
        refused: Faults = {}
        while self._replica.due():
            arrived = self._pending.popleft().wait()
            refused |= self._replica.receive(arrived.messages, arrived.leave_out)
            refused |= arrived.refused
        for replica, what in sorted(refused.items()):
            log.warning("the result of replica %d is refused: %s", replica, what)
        return refused

    def settle(self) -> None:
        """Wait until nothing is under way between replicas; results stay to be received."""
        self._link.settle()

    def resume(self) -> None:
        """After the replica's `load_state_dict`: messages that were in flight are so again."""
        self.settle()
        self._compare()
        self._pending = deque(
            Flight(self._link, *self._replica.flight(at), message)
            for at, message in enumerate(self._replica.in_flight())
        )

    def _compare(self) -> None:
        """All replicas have the method, the step and the shared parameters alike."""
        replica = self._replica
        shared = [local_tensor(p) for p in replica.plain().values()]
        hashed = torch.stack([hash_bits(p).cpu() for p in shared])
        method = replica.method.hash() - (1 << 63)  # as int64 has it
        own = torch.tensor([method, replica.step, int(hash_bits(hashed))])
        found = exchange.start(own.to(shared[0].device), self._group).wait().cpu()
        for what, column in zip(("method", "step", "parameters"), found.t(), strict=True):
            for other in (column != column[0]).nonzero().view(-1).tolist():
                raise ValueError(
                    f"the {what} of replica {other} and of replica 0 differ; all have to begin "
                    "with the same"
                )
