"""Gathers that outlive a peer, as an elastic run has them: `rank.epochs` makes them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Gathered:
    """What ranks have sent, the same on all that get it.

    Attributes:
        ranks: who, in order; some may be gone since.
        rows: uint8 `[ranks, n]` in host memory.
    """

    ranks: Sequence[int]
    rows: Tensor


class Gathers(ABC):
    """Gathers in one order on all ranks, whose results are all members' or nobody's.

    Attributes:
        replicas: the most that there may be.
        size: ranks of a replica: `rank = replica * size + place`.
        rank: this rank.
        epoch: counts the changes of members.
    """

    replicas: int
    size: int
    rank: int
    epoch: int

    @abstractmethod
    def gather(
        self, sent: Tensor | Callable[[], Tensor], *, everyone: bool = False
    ) -> Future[Gathered]:
        """Begins to gather bytes.

        Args:
            sent: uint8 `[n]` in host memory, `n` the same everywhere; or what gives it once all
                earlier gathers are done.
            everyone: from all ranks, not only from those with the same place in other replicas.
        """


@dataclass(frozen=True)
class Numbers:
    """A gather of int64 numbers under way, as far as `exchange.Pending` is asked of it."""

    _gathered: Future[Gathered]
    _rank: int

    @staticmethod
    def begin(numbers: Tensor, gathers: Gathers) -> Numbers:
        """Begins to gather int64 `[n]` from the ranks with the same place."""
        return Numbers(gathers.gather(numbers.cpu().view(torch.uint8)), gathers.rank)

    def others(self) -> list[int] | None:
        """The ranks that have sent something else, where more than half have sent the same as this.

        None where they have not: it may be this one that is wrong.
        """
        gathered = self._gathered.result()
        own = gathered.rows[gathered.ranks.index(self._rank)]
        same = gathered.rows.eq(own).all(dim=1).tolist()
        if 2 * sum(same) <= len(same):
            return None
        return [rank for rank, alike in zip(gathered.ranks, same, strict=True) if not alike]

    def host(self) -> Tensor:
        """All ranks' numbers: int64 `[ranks, n]`."""
        return self._gathered.result().rows.view(torch.int64)
