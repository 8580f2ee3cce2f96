"""All-gather of one flat message per rank, asynchronous; what all refuse is `distro.verdict`'s.

A message costs as much as many KiB (on gloo 150 messages of 4 KiB take 160 times as long as one
of the same bytes), so that whatever peers exchange travels as one, cut only where it is larger than
a bucket. The exchange begins as soon as there is something to send and is waited for where it is
used, so that compute runs meanwhile: on CUDA a process group has a communicator and a stream of
its own, on gloo a thread.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from psyche_fast.compat import all_gather_single
from psyche_fast.devices import message_for
from psyche_fast.distro.message import MessageFormat, Unpacking
from psyche_fast.distro.verdict import Standing, Verdict, agree, left_out
from psyche_fast.kernels.plan import Entries

log = logging.getLogger(__name__)

BUCKET_BYTES = {"cpu": 8 << 20, "cuda": 64 << 20}
"""The most that one rank hands to one collective, by where the bytes lie. Messages of more than a
few MiB gain nothing from being larger on gloo; NCCL has buffers and rings to fill."""


class Arriving(Protocol):
    """Messages under way."""

    def wait(self) -> Tensor:
        """All peers' messages, as `Pending.wait` gives them."""

    def senders(self) -> Sequence[int]:
        """The replicas whose messages these are, in order."""


@dataclass(frozen=True)
class Pending:
    """An exchange under way.

    Attributes:
        bytes_sent: size of this rank's contribution; 0 where there is nobody to send it to.
    """

    bytes_sent: int
    _device: torch.device
    _sent: Sequence[Tensor]  # kept alive until the collectives have read them
    _received: Sequence[Tensor]
    _works: Sequence[dist.Work | PointToPoint]

    def wait(self) -> Tensor:
        """All peers' messages, `[ranks, n]`, in the order of ranks: the same on every peer.

        They lie where the own message does. On a GPU it is the current stream that waits, and over
        gloo the host, for the link but not for the device.
        """
        self._synchronize()
        parts = [part.to(self._device, non_blocking=True) for part in self._received]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def senders(self) -> Sequence[int]:
        """The replicas whose messages `wait` gives, in its order."""
        return range(len(self._received[0]))

    def host(self) -> Tensor:
        """What `wait` gives, in host memory; nothing else that the device does is waited for."""
        if self._works and self._received[0].is_cuda:
            beside = torch.cuda.Stream(self._device)
            with torch.cuda.stream(beside):
                self._synchronize()
                parts = [part.to("cpu", non_blocking=True) for part in self._received]
            beside.synchronize()
        else:
            self._synchronize()
            parts = [part.cpu() for part in self._received]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _synchronize(self) -> None:
        for work in self._works:
            work.wait()


def start(message: Tensor, peers: dist.ProcessGroup | None) -> Pending:
    """Begin an exchange.

    Args:
        message: `[n]`, of the same size and type on every peer. Where it lies on a GPU and the
            peers talk over gloo, it goes through host memory and the device is waited for.
        peers: the group to exchange with; None where there is nobody (nothing is sent).
    """
    if peers is None:
        return Pending(0, message.device, [], [message.unsqueeze(0)], [])
    staged = message_for(peers, message)
    limit = BUCKET_BYTES[staged.device.type] // message.element_size()
    sent = staged.split(limit)
    ranks = dist.get_world_size(peers)
    # Over gloo for a GPU: only from pinned memory does a copy go there without the host.
    pinned = message.is_cuda and not staged.is_cuda
    received = [part.new_empty((ranks, part.numel()), pin_memory=pinned) for part in sent]
    works = [
        work
        for into, part in zip(received, sent, strict=True)
        for work in _all_gather(into, part, peers)
    ]
    return Pending(message.nbytes, message.device, sent, received, works)


def _all_gather(
    received: Tensor, sent: Tensor, group: dist.ProcessGroup
) -> Sequence[dist.Work | PointToPoint]:
    """Fill `received [ranks, n]` from every rank's `sent [n]`, in rank order."""
    if len(received) == 2 and not sent.is_cuda:
        # Over one connection, on which gloo's all-gather sends first: what asks for the other's
        # message waits behind the own one, and a link goes one way at a time.
        own = dist.get_rank(group)
        other = 1 - own
        received[own].copy_(sent)
        return [
            PointToPoint(
                partial(dist.irecv, received[other], group=group, group_src=other),
                partial(dist.isend, sent, group=group, group_dst=other),
            )
        ]
    work = all_gather_single()(received.view(-1), sent, group=group, async_op=True)
    return [] if work is None else [work]


class PointToPoint:
    """What goes between two ranks, to be waited for as a collective is.

    That is again and again, by any thread, and where what fails says so: it begins whether or not
    the other rank is still there.

    Args:
        begin: each begins one, in their order.
    """

    def __init__(self, *begin: Callable[[], dist.Work | None]) -> None:
        self._works: list[dist.Work] = []
        self._error: RuntimeError | None = None
        self._lock = threading.Lock()
        try:
            for one in begin:
                work = one()
                if work is not None:
                    self._works.append(work)
        except RuntimeError as error:
            self._error = error

    def wait(self) -> None:
        """Waits, whichever thread comes first; the others for that one.

        Raises:
            RuntimeError: a connection is lost, or nothing has come in time.
        """
        with self._lock:
            if self._error is not None:
                raise self._error
            while self._works:  # none may be waited for twice
                self._works[0].wait()
                del self._works[0]


class Exchange:
    """The peers' results of step after step: sent, checked, and refused by all or by none.

    Damage on the way may befall one receiver alone. If others applied what that one refuses, the
    replicas would part, so that all ranks agree on what is left out. That begins as soon as a
    message has arrived, beside whatever else is going on, and is over by the time that results are
    wanted unless the link is late: no step waits for it.

    Args:
        form: how results travel.
        peers: the ranks that exchange them; None where there is nobody.
        agreement: the ranks that have to leave out the same: `peers`, and others with peers of
            their own, as many. Of gloo, and for this use alone.

    Attributes:
        bytes_sent: size of this rank's last message; 0 where there is nobody to send it to.
        bytes_received: of the others' messages of that exchange.
        others: how many peers there may be beside this one.
        number: exchanges that there have been, those before a checkpoint too.
        standing: whose results are left out for a while.
        refused: replicas whose results among the last that were received have been refused, each
            with 1, and how many further ones will be left out unseen.
    """

    def __init__(
        self,
        form: MessageFormat,
        peers: dist.ProcessGroup | None,
        agreement: dist.ProcessGroup | None,
    ) -> None:
        assert (peers is None) == (agreement is None)
        self.bytes_sent = self.bytes_received = 0
        self._form, self._peers, self._agreement = form, peers, agreement
        self.number = 0
        self._rank, replicas = 0, 1
        if peers is not None:
            self._rank, replicas = dist.get_rank(peers), dist.get_world_size(peers)
        self.others = replicas - 1
        self.standing = Standing(replicas)
        self.refused: dict[int, int] = {}
        self.left_out: dict[int, int] = {}
        self._under_way: deque[tuple[Arriving, Future[Verdict], int]] = deque()
        self._unpacking: tuple[Unpacking, Verdict, Sequence[int], int] | None = None
        self._kept: tuple[list[Entries] | None] | None = None

    def __len__(self) -> int:
        """How many results have been sent and not been received."""
        held = (self._unpacking, self._kept)
        return len(self._under_way) + sum(one is not None for one in held)

    def send(self, entries: Sequence[Entries]) -> None:
        """Send this rank's entries on their way."""
        pending = start(self._form.pack(entries, self.number, self._rank), self._peers)
        self.bytes_sent = pending.bytes_sent
        self.bytes_received = self.others * pending.bytes_sent
        check: Future[Verdict] = Future()
        if self._agreement is None:
            check.set_result(Verdict())
        else:
            # Agreements are collectives: one at a time, in the order of steps.
            before = self._under_way[-1][1] if self._under_way else None
            arguments = check, before, pending, self.number
            threading.Thread(
                target=self._check, args=arguments, name="results", daemon=True
            ).start()
        self._under_way.append((pending, check, self.number))
        self.number += 1

    def poll(self) -> None:
        """Begin to unpack the oldest results if they have arrived; waits for nothing."""
        if self._unpacking is None and self._under_way and self._under_way[0][1].done():
            self._unpack()

    def receive(self) -> list[Entries] | None:
        """The oldest results, those of all peers side by side; waits for them.

        What cannot be right is left out by all, with a warning that names the sender.

        Returns:
            One `Entries` per chunk class; None where everything is refused.
        """
        if self._kept is not None:
            (entries,), self._kept = self._kept, None
            return entries
        return self._take()

    def _take(self) -> list[Entries] | None:
        if self._unpacking is None:
            self._unpack()
        assert self._unpacking is not None
        unpacking, verdict, senders, number = self._unpacking
        self._unpacking = None
        entries, faults = unpacking.result()
        refused = {senders[row]: what for row, what in {**verdict.refused, **faults}.items()}
        unseen = {senders[row] for row in verdict.left_out}
        self.refused = dict.fromkeys(sorted(refused), 1)
        self.left_out = {r: n - number for r, n in self.standing.left_out(number).items()}
        for replica, what in sorted(refused.items()):
            if replica not in unseen:
                log.warning("the result of replica %d is refused: %s", replica, what)
        return entries

    def settle(self) -> None:
        """Wait until nothing is under way any more; results stay to be received."""
        for _, check, _ in self._under_way:
            check.result()

    def arrived(self) -> list[Entries] | None:
        """Between steps: the results that the next `receive` gives, and still does then.

        None where everything is refused, or before the first ones.
        """
        assert len(self) < 2
        if self._kept is None and len(self):
            self._kept = (self._take(),)
        return None if self._kept is None else self._kept[0]

    def load(self, arrived: list[Entries] | None) -> None:
        """Have the next `receive` give these results."""
        assert len(self) == 0
        self._kept = (arrived,)

    def _unpack(self) -> None:
        pending, check, number = self._under_way.popleft()
        verdict = check.result()
        unpacking = verdict.decoded
        if unpacking is None:
            unpacking = self._form.begin_unpack(pending.wait(), leave_out=verdict.refused)
        self._unpacking = unpacking, verdict, pending.senders(), number

    def _check(
        self,
        check: Future[Verdict],
        before: Future[Verdict] | None,
        pending: Pending,
        number: int,
    ) -> None:
        """Check messages that arrive, and agree on them; what fails is raised by `check`."""
        try:
            if before is not None:
                before.result()
            check.set_result(self._judge(pending.host(), number))
        except Exception as error:
            check.set_exception(error)

    def _note(self, number: int, offenders: set[int]) -> None:
        for replica, until in self.standing.note(number, offenders).items():
            log.warning(
                "replica %d is left out for %d steps: too many of its results were refused",
                replica, until - number - 1,
            )  # fmt: skip

    def _judge(self, messages: Tensor, number: int) -> Verdict:
        assert self._agreement is not None
        pauses = self.standing.left_out(number)
        faults = {r: left_out(until) for r, until in pauses.items()}
        found = self._form.faults(messages, number, range(len(messages)))
        faults = {**found, **faults}
        decoded, further = self._form.decode(messages, faults)
        refused, offenders = agree(faults | further, messages, self._agreement)
        self._note(number, offenders - pauses.keys())
        # What is decoded already serves where nothing but the malformed is refused beyond it.
        if decoded is not None and refused.keys() != faults.keys():
            decoded = self._form.begin_unpack(messages, leave_out=refused)
        return Verdict(refused, frozenset(pauses), decoded)
