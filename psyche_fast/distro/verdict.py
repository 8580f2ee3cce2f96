"""Which results are refused: by all ranks or by none, and whose are left out for a while."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from psyche_fast.devices import backends_of
from psyche_fast.distro.message import Unpacking

OPINION = 1 + 16
"""Bytes of a rank's opinion on a message."""
_OFFENCES = 3
"""So many refused results"""
_WINDOW = 100
"""within so many exchanges leave a replica out"""
_PAUSE = 50
"""for so many, and twice as many each further time,"""
_MOST = 10
"""so often doubled at most."""


@dataclass(frozen=True)
class Verdict:
    """What becomes of the messages of one exchange.

    Attributes:
        refused: their numbers, each with what is wrong; the same numbers on every rank.
        left_out: of these, those that nobody has looked at.
        decoded: what this rank has decoded of them; None for nothing.
    """

    refused: Mapping[int, str] = field(default_factory=dict)
    left_out: frozenset[int] = frozenset()
    decoded: Unpacking | None = None


def agree(
    faults: Mapping[int, str], messages: Tensor, group: dist.ProcessGroup
) -> tuple[dict[int, str], set[int]]:
    """Which messages any rank of a group refuses; a collective that waits for the other ranks.

    Each rank tells every other at once, where a reduction would go round a ring: over a slow link
    that takes one way instead of two for every rank. It tells what it refuses, and a digest of what
    it has got: of a sender that tells one rank this and another that, nobody takes anything.

    Args:
        faults: what is wrong with the messages that this rank refuses, by their numbers.
        messages: uint8 `[senders, n]` in host memory; rank `sender * places + place` has got those
            of the ranks with its place.
        group: the ranks.

    Returns:
        The same numbers on every rank, in order, each with what is wrong or who refuses it. And the
        senders that more than half of the others refuse: what one refuses may be the link's fault.
    """
    ranks, senders = dist.get_world_size(group), len(messages)
    on_host = "cpu" in backends_of(group)
    device = torch.device("cpu") if on_host else torch.device("cuda", torch.cuda.current_device())
    sent = opinions(faults, messages).repeat(ranks, 1, 1).to(device)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return conclude(faults, received.cpu(), senders)


def opinions(faults: Mapping[int, str], messages: Iterable[Tensor]) -> Tensor:
    """What a rank says of each sender's message `[n]`: uint8 `[senders, OPINION]`."""
    return torch.stack([opinion(row, number in faults) for number, row in enumerate(messages)])


def opinion(message: Tensor, state: int) -> Tensor:
    """What a rank says of a message: uint8 `[OPINION]`, its state and what has been got."""
    digest = hashlib.blake2b(message.numpy().data, digest_size=OPINION - 1).digest()
    return torch.frombuffer(bytearray([state, *digest]), dtype=torch.uint8)


@dataclass(frozen=True)
class Judgement:
    """What ranks together say of one sender.

    Attributes:
        by: the ranks that refuse what they have got from it.
        differs: whether others, in the same place, have got different things.
        offends: whether more than half of the other replicas refuse it, in some place.
    """

    by: Sequence[int]
    differs: bool
    offends: bool

    def why(self, own: str | None) -> str | None:
        """What is wrong, if anything; `own` is what this rank has found."""
        if self.by:
            return own or f"it has arrived damaged at rank {', '.join(map(str, self.by))}"
        return "not all have got the same from it" if self.differs else None


def judge(opinions: Tensor, ranks: Sequence[int], sender: int, places: int, bad: int) -> Judgement:
    """Puts opinions on one sender together.

    Args:
        opinions: uint8 `[ranks, OPINION]`.
        ranks: whose they are; `rank = replica * places + place`.
        sender: the replica.
        places: ranks of a replica.
        bad: the state of what is refused.
    """
    states = opinions[:, 0].tolist()
    by = [rank for rank, state in zip(ranks, states, strict=True) if state == bad]
    differs = offends = False
    for place in range(places):
        here = [at for at, rank in enumerate(ranks) if rank % places == place]
        got = {bytes(opinions[at, 1:].tolist()) for at in here if states[at] != bad}
        differs |= len(got) > 1
        others = [at for at in here if ranks[at] // places != sender]
        offends |= 2 * sum(states[at] == bad for at in others) > len(others)
    return Judgement(by, differs, offends)


def conclude(
    faults: Mapping[int, str], said: Tensor, senders: int
) -> tuple[dict[int, str], set[int]]:
    """`agree` for what all ranks have said: uint8 `[ranks, senders, OPINION]`."""
    ranks, places = range(len(said)), len(said) // senders
    refused: dict[int, str] = {}
    offenders = set()
    for sender in range(senders):
        judgement = judge(said[:, sender], ranks, sender, places, True)
        if (why := judgement.why(faults.get(sender))) is not None:
            refused[sender] = why
        if judgement.offends:
            offenders.add(sender)
    return refused, offenders


def left_out(until: int) -> str:
    """What is wrong with a message that nobody looks at."""
    return f"its replica is left out before exchange {until}"


class Standing:
    """Whose results are left out for a while, for those before them were refused.

    What it hangs on all ranks agree on, so that all leave out the same.

    Args:
        replicas: of the run.
    """

    def __init__(self, replicas: int) -> None:
        self._times = [0] * replicas
        self._until = [0] * replicas
        self._offences: list[list[int]] = [[] for _ in range(replicas)]

    def left_out(self, number: int) -> dict[int, int]:
        """Who is left out of an exchange, and before which exchange that is over."""
        return {r: until for r, until in enumerate(self._until) if number < until}

    def note(self, number: int, offenders: set[int]) -> dict[int, int]:
        """Takes up an exchange; who is left out from the next one on, and until when."""
        begun = {}
        for replica in sorted(offenders):
            recent = [n for n in self._offences[replica] if n > number - _WINDOW]
            recent.append(number)
            if len(recent) >= _OFFENCES:
                pause = _PAUSE << min(self._times[replica], _MOST)
                self._times[replica] += 1
                begun[replica] = self._until[replica] = number + 1 + pause
                recent = []
            self._offences[replica] = recent
        return begun

    def state(self) -> Tensor:
        """All that there is of it: int64 `[replicas, 5]`."""
        rows = [
            [times, until, *(offences + [-1] * _OFFENCES)[:_OFFENCES]]
            for times, until, offences in zip(self._times, self._until, self._offences, strict=True)
        ]
        return torch.tensor(rows, dtype=torch.int64).view(len(rows), 2 + _OFFENCES)

    def load(self, state: Tensor) -> None:
        """Takes up what `state` gave, of as many replicas as are there."""
        for replica, (times, until, *offences) in enumerate(state.tolist()[: len(self._times)]):
            self._times[replica], self._until[replica] = times, until
            self._offences[replica] = [number for number in offences if number >= 0]
