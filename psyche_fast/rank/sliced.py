"""Groups of gloo's whose collectives are waited for in slices, with a look at the store between.

A peer that dies fails the collectives of its neighbours in the ring alone; the others are told by
the store. Torch's own waits would not listen.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from psyche_fast.compat import all_gather_into, broadcast_from

SLICE = timedelta(seconds=0.1)
_CONNECT = timedelta(seconds=5)
_SLACK = timedelta(seconds=30)
"""What torch gives a collective beyond what is waited for here, where the one to blame is known."""
_PART = 8 << 20
"""The most bytes in one collective."""


@dataclass(frozen=True)
class Ended:
    """Why an epoch is over for a rank.

    Attributes:
        why: for the log.
        late: the gather for which it has waited too long.
    """

    why: str
    late: int | None = None


_NOT_YET = Ended("")


class Group:
    """Ranks that are connected, beside torch's default group.

    Args:
        store: where they meet.
        ranks: all, in order.
        rank: this one.
        is_over: whether others say that nothing more will come.

    Raises:
        RuntimeError: they do not come together.
    """

    def __init__(
        self, store: dist.Store, ranks: Sequence[int], rank: int, is_over: Callable[[], bool]
    ) -> None:
        self.ranks, self._is_over = ranks, is_over
        self._group = None
        if len(ranks) > 1:
            self._group = dist.ProcessGroupGloo(store, ranks.index(rank), len(ranks), _CONNECT)
        self._works: list[dist.Work] = []

    @property
    def is_busy(self) -> bool:
        """Whether something is under way, for which dropping the group would wait."""
        return not all(work.is_completed() for work in self._works)

    def all_gather(
        self, sent: Tensor, limit: timedelta, number: int | None
    ) -> tuple[Tensor | None, Ended | None]:
        """`sent [n]` of each rank, uint8: `[ranks, n]`, or why there is none.

        Args:
            sent: this rank's.
            limit: how long to wait.
            number: what `Ended.late` is to say.
        """
        rows = torch.empty((len(self.ranks), sent.numel()), dtype=torch.uint8)
        if self._group is None or not sent.numel():
            rows.copy_(sent)
            return rows, None
        pieces = sent.split(_PART)
        parts = rows.split(_PART, dim=1)
        into = [part if len(parts) == 1 else torch.empty_like(part) for part in parts]
        most = limit + _SLACK
        ended = self._carry_out(
            [
                partial(all_gather_into, self._group, target, piece, most)
                for target, piece in zip(into, pieces, strict=True)
            ],
            limit,
            number,
        )
        if ended is not None:
            return None, ended
        if len(parts) > 1:
            for part, target in zip(parts, into, strict=True):
                part.copy_(target)
        return rows, None

    def broadcast(self, content: Tensor, giver: int, limit: timedelta) -> Ended | None:
        """Fills `content`, contiguous, with what a rank has of it."""
        if self._group is None:
            return None
        root = self.ranks.index(giver)
        for part in content.view(-1).split(max(_PART // content.element_size(), 1)):
            if not part.numel():
                continue
            begin = partial(broadcast_from, self._group, part, root, limit + _SLACK)
            ended = self._carry_out([begin], limit, None)
            if ended is not None:
                return ended
        return None

    def _carry_out(
        self, collectives: Sequence[Callable[[], dist.Work]], limit: timedelta, number: int | None
    ) -> Ended | None:
        """Begins collectives and waits for them; no traceback is left that holds the group."""
        until = time.monotonic() + limit.total_seconds()
        works = self._works = []
        for begin in collectives:
            try:
                works.append(begin())
            except RuntimeError as error:
                ended = Ended(first_line(error))
            else:
                continue
            return ended
        for work in works:
            while (outcome := _wait_a_slice(work)) is _NOT_YET:
                if self._is_over():
                    return Ended("others say so")
                if time.monotonic() > until:
                    return Ended("a rank did not answer within --timeout", number)
            if outcome is not None:
                return outcome
        return None


def _wait_a_slice(work: dist.Work) -> Ended | None:
    """Nothing when it is done; `_NOT_YET`, or why it has failed."""
    try:
        work.wait(SLICE)
        return None
    except RuntimeError:
        if not work.is_completed():
            return _NOT_YET
    try:
        work.wait()  # returns at once: it may have come to a good end since
    except RuntimeError as error:
        return Ended(first_line(error))
    return None


def first_line(error: Exception) -> str:
    """The first line of what an error says, or its kind."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__
