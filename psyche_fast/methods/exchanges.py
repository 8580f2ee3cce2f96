"""How messages of replicas become what each of them receives: between processes, and in one."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from psyche_fast.compat import default_store, group_timeout
from psyche_fast.devices import message_for
from psyche_fast.distro import exchange
from psyche_fast.distro.verdict import conclude, opinions
from psyche_fast.methods.hierarchy import Level
from psyche_fast.methods.message import Format
from psyche_fast.methods.owners import Owners
from psyche_fast.methods.replica import Faults, Replica


@dataclass(frozen=True)
class Arrived:
    """What `Replica.receive` is given.

    Attributes:
        messages: see there.
        leave_out: of these, those that all replicas have agreed to refuse.
        refused: replicas whose results no owner has merged, with the reason.
    """

    messages: Tensor
    leave_out: Faults
    refused: Faults = field(default_factory=dict)


class InProcess:
    """The exchange of replicas that are all here: the same bytes and checks as between processes.

    Args:
        replicas: in the order of their numbers.
    """

    def __init__(self, replicas: Sequence[Replica | Level]) -> None:
        self._replicas = replicas

    @torch.no_grad()
    def deliver(
        self, messages: Sequence[Tensor], at: int = -1, leave_out: Collection[int] = ()
    ) -> Arrived:
        """What all replicas receive of the messages that they have sent.

        Args:
            messages: one of each replica, of the same round; the newest ones.
            at: which of those in flight they are; the newest where -1.
            leave_out: replicas to leave out.
        """
        form, turn = self._replicas[0].flight(at)
        refused = dict.fromkeys(leave_out, "left out")
        if not isinstance(form, Owners):
            stacked = torch.stack(list(messages))
            return Arrived(stacked, form.faults(turn, stacked) | refused)
        owners, parts = [], []
        for number, replica in enumerate(self._replicas):
            owner, _ = replica.flight(at)
            assert isinstance(owner, Owners)
            owners.append(owner)
            parts.append(torch.stack([m.split(owner.sizes)[number] for m in messages]))
            refused |= owner.check_parts(turn, parts[-1])
        merged = [o.merge(turn, p, refused) for o, p in zip(owners, parts, strict=True)]
        arrived = torch.cat(merged)
        return Arrived(arrived, form.faults(turn, arrived, refused), refused)


def traffic(form: Format | Owners, replica: int, replicas: int) -> tuple[int, int]:
    """The bytes that a replica hands over for a message, and those that come from others."""
    if replicas == 1:
        return 0, 0
    if not isinstance(form, Owners):
        return form.size, (replicas - 1) * form.size
    own, merged = form.sizes[replica], form.merged_sizes
    sent = form.size - own + (replicas - 1) * merged[replica]
    return sent, (replicas - 1) * own + sum(merged) - merged[replica]


class Flight:
    """A message on its way between processes, until all have agreed on what has come of it.

    What has to be waited for a thread waits for, so that nobody does who has something else to do.

    Attributes:
        bytes_sent: what this rank has handed over: of an all-gather its message, and of owners each
            copy of what goes to another.
        bytes_received: what comes from others.
    """

    def __init__(self, link: Link, form: Format | Owners, turn: int, message: Tensor) -> None:
        self._link, self._form, self._turn = link, form, turn
        self._decided: Future[None] = Future()  # what is refused of the messages
        self._arrived: Future[Arrived] = Future()
        before, link.last = link.last, self
        replicas, replica = link.replicas, link.replica
        if link.group is None:
            self.bytes_sent = self.bytes_received = 0
            self._decided.set_result(None)
            self._arrived.set_result(Arrived(message[None], {}))
            return
        self.bytes_sent, self.bytes_received = traffic(form, replica, replicas)
        if isinstance(form, Owners):
            own = form.sizes[replica]
            assert link.up is not None
            parts = link.up.all_to_all(message, form.sizes, [own] * replicas)
            work = partial(self._own, form, parts, before)
        else:
            pending = exchange.start(message, link.group)
            work = partial(self._gather, form, pending, before)
        threading.Thread(target=self._run, args=(work,), name="results", daemon=True).start()

    def wait(self) -> Arrived:
        """What has come, once all ranks agree on it."""
        return self._arrived.result()

    @torch.no_grad()
    def _run(self, work: partial[Arrived]) -> None:
        try:
            self._arrived.set_result(work())
        except Exception as error:  # whoever waits raises it
            if not self._decided.done():
                self._decided.set_exception(error)
            self._arrived.set_exception(error)

    def _gather(self, form: Format, pending: exchange.Pending, before: Flight | None) -> Arrived:
        messages = pending.host()
        faults = form.faults(self._turn, messages)
        if self._link.is_sharded:  # others see other content, but have to leave out the same
            faults |= form.unpack(messages.to(form.device), faults)[1]
        self._decided.set_result(None)
        # Agreements are collectives: one at a time, in the order of messages.
        if before is not None:
            before.wait()
        return Arrived(messages, self._link.agree(faults, messages))

    def _own(self, form: Owners, parts: Parts, before: Flight | None) -> Arrived:
        link, turn = self._link, self._turn
        assert link.down is not None
        rows = parts.wait().view(link.replicas, -1).to(form.device)
        faults = form.check_parts(turn, rows)
        if before is not None:
            before._decided.result()
        nothing = torch.empty(link.replicas, 0, dtype=torch.uint8)  # each has got something else
        refused = link.agree(faults, nothing, first=True)
        message = form.merge(turn, rows, refused)
        sizes = [message.numel()] * link.replicas
        merged = link.down.all_to_all(message.repeat(link.replicas), sizes, form.merged_sizes)
        self._decided.set_result(None)
        arrived = merged.wait()
        found = form.faults(turn, arrived, refused)
        if link.is_sharded:
            found |= form.malformed(arrived.to(form.device), found)
        if before is not None:
            before.wait()
        leave_out = link.agree(found, form.split(arrived))
        return Arrived(arrived, leave_out, refused)


class Link:
    """The groups that a replica's messages go by; a collective of their ranks.

    Beside the group that is given these are gloo's, made for this alone, since each is used by
    threads and at its own pace: what owners get and send goes through host memory.

    Args:
        group: the ranks with the other replicas; None where there are none.
        inside: groups that together connect all ranks of this replica, where it has several.
        owned: whether owners merge results.

    Attributes:
        group: see above.
        replica: this one's number.
        replicas: how many there are.
        is_sharded: whether they have several ranks.
        up: for what owners get; None where all results are gathered.
        down: for what they send.
        last: the newest message.
    """

    def __init__(
        self, group: dist.ProcessGroup | None, inside: Sequence[dist.ProcessGroup], *, owned: bool
    ) -> None:
        self.group, self.replica, self.replicas = group, 0, 1
        self.is_sharded = bool(inside)
        self.up: _Gloo | None = None
        self.down: _Gloo | None = None
        self.last: Flight | None = None
        if group is None:
            return
        self.replica, self.replicas = dist.get_rank(group), dist.get_world_size(group)
        peers = dist.get_process_group_ranks(group)
        name = message_for(group, torch.tensor([secrets.randbits(62)]))
        name = exchange.start(name, group).wait()[0]  # that nobody has had
        # Counterparts by their places. All have to leave out the same, whatever is in their shards:
        # what tensor parallelism replicates is every rank's.
        places = {(*peers, int(name))}
        for connected in inside:
            places = _united(places, connected)
        *rows, names = zip(*sorted(places), strict=True)
        everyone = [rank for row in rows for rank in row]
        self._first = _Gloo(f"{names[0]}/first", everyone) if owned else None
        self._last = _Gloo(f"{names[0]}/last", everyone)
        if owned:
            self.up, self.down = (_Gloo(f"{int(name)}/{way}", peers) for way in ("up", "down"))

    def agree(self, faults: Faults, messages: Iterable[Tensor], *, first: bool = False) -> Faults:
        """What any rank of any replica refuses; a collective, see `distro.verdict.agree`.

        Args:
            faults: what this rank refuses, and why.
            messages: what has come, in host memory, of every replica.
            first: of what owners get.
        """
        said = opinions(faults, messages)
        group = self._first if first else self._last
        assert group is not None
        received = group.all_to_all(
            said.flatten().repeat(group.size),
            [said.numel()] * group.size,
            [said.numel()] * group.size,
        ).wait()
        return conclude(faults, received.view(group.size, *said.shape), len(said))[0]

    def settle(self) -> None:
        """Wait until nothing is under way."""
        if self.last is not None:
            self.last.wait()
            self.last = None


class _Gloo:
    """A group of gloo beside torch's own, which all ranks of the world would have to make.

    Args:
        name: nobody else's.
        ranks: who, in this order.
    """

    def __init__(self, name: str, ranks: Sequence[int]) -> None:
        store = dist.PrefixStore(f"psyche_fast/{name}", default_store())
        self.size, self._own = len(ranks), list(ranks).index(dist.get_rank())
        # Stubs lack what goes from one rank to another.
        self._group: Any = dist.ProcessGroupGloo(store, self._own, self.size, group_timeout())

    def all_to_all(self, sent: Tensor, sizes: Sequence[int], received: Sequence[int]) -> Parts:
        """Begins to send another part to each rank, to all at once.

        What is to come is asked for first. Gloo's own all-to-all sends first, so that where one
        rank is later by more than the link's latency, what asks for the other's part waits behind
        its own: the two then go one after the other.

        Args:
            sent: uint8 `[sum(sizes)]`; where it lies on a GPU the device is waited for.
            sizes: bytes for each rank.
            received: bytes from each.
        """
        staged = sent.cpu()
        into = staged.new_empty(sum(received))
        come, go = into.split(list(received)), staged.split(list(sizes))
        others = [(self._own + n) % self.size for n in range(1, self.size)]
        begin = [partial(self._group.recv, [come[r]], r, 0) for r in others if received[r]]
        begin += [partial(self._group.send, [go[r]], r, 0) for r in others if sizes[r]]
        come[self._own].copy_(go[self._own])
        return Parts(into, staged, exchange.PointToPoint(*begin))


@dataclass(frozen=True)
class Parts:
    """A part from each rank, under way."""

    _received: Tensor
    _sent: Tensor  # kept alive until it has been read
    _work: exchange.PointToPoint

    def wait(self) -> Tensor:
        """What has come, uint8 in host memory, in the order of ranks."""
        self._work.wait()
        return self._received


def _united(places: set[tuple[int, ...]], group: dist.ProcessGroup) -> set[tuple[int, ...]]:
    """What any rank of a group has: tuples of one length, at least one on each."""
    own = message_for(group, torch.tensor(sorted(places)))
    counts = [own.new_empty(()) for _ in range(dist.get_world_size(group))]
    dist.all_gather(counts, own.new_tensor(len(own)), group=group)
    rows = max(int(count) for count in counts)
    padded = torch.cat([own, own[:1].expand(rows - len(own), -1)])
    found = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(found, padded, group=group)
    return {tuple(row) for row in torch.cat(found).tolist()}
