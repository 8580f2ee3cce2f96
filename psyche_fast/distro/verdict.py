"""Which results are refused: by all ranks or by none, and whose are left out for a while."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from psyche_fast.distro.message import Unpacking

_DIGEST = 16
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
    on_host = dist.get_backend(group) == "gloo"
    device = torch.device("cpu") if on_host else torch.device("cuda", torch.cuda.current_device())
    own = torch.stack(
        [_opinion(row, refused=number in faults) for number, row in enumerate(messages)]
    )
    sent = own.repeat(ranks, 1, 1).to(device)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return conclude(faults, received.cpu(), senders)


def _opinion(message: Tensor, *, refused: bool) -> Tensor:
    digest = hashlib.blake2b(message.numpy().data, digest_size=_DIGEST).digest()
    return torch.frombuffer(bytearray([refused, *digest]), dtype=torch.uint8)


def conclude(
    faults: Mapping[int, str], opinions: Tensor, senders: int
) -> tuple[dict[int, str], set[int]]:
    """`agree` for what all ranks have said: uint8 `[ranks, senders, 1 + digest]`."""
    places = len(opinions) // senders
    refused: dict[int, str] = {}
    offenders = set()
    for sender in range(senders):
        said = opinions[:, sender]
        by = said[:, 0].nonzero().view(-1).tolist()
        differ = False
        for place in range(places):
            at = range(place, len(opinions), places)
            kept = {bytes(said[rank].tolist()) for rank in at if rank not in by}
            differ |= len(kept) > 1
            others = [rank for rank in at if rank // places != sender]
            if 2 * sum(rank in by for rank in others) > len(others):
                offenders.add(sender)
        if by:
            who = ", ".join(map(str, by))
            refused[sender] = faults.get(sender, f"it has arrived damaged at rank {who}")
        elif differ:
            refused[sender] = "not all have got the same from it"
    return refused, offenders


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
