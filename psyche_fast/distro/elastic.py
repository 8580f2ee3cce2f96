"""Results between replicas that may come and go: `Exchange` on gathers that outlive a peer."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch import Tensor

from psyche_fast.distro.exchange import Exchange
from psyche_fast.distro.gathers import Gathered, Gathers
from psyche_fast.distro.message import MessageFormat
from psyche_fast.kernels.plan import Entries

_MISSING, _GOOD, _FAULTY = range(3)


@dataclass(frozen=True)
class _Arriving:
    """Messages under way."""

    replicas: Future[list[int]]
    """Whose messages count, or are refused: all that every rank has."""
    _device: torch.device
    _gathered: Future[Gathered]
    _size: int

    def wait(self) -> Tensor:
        gathered, kept = self._gathered.result(), self.replicas.result()
        rows = [at for at, r in enumerate(gathered.ranks) if r // self._size in kept]
        messages = gathered.rows if len(rows) == len(gathered.rows) else gathered.rows[rows]
        return messages.to(self._device, non_blocking=True)

    def senders(self) -> Sequence[int]:
        return self.replicas.result()


class ElasticExchange(Exchange):
    """`Exchange` between replicas that may come and go.

    What all ranks have of a step counts, with the mean over those who sent it. A message that
    some place of a replica got out before it died and another did not counts nowhere: what
    tensor parallelism replicates has to stay every rank's.

    Args:
        form: how results travel.
        gathers: between the ranks.

    Attributes:
        senders: whose results of the last step that was sent will count or be refused.
    """

    def __init__(self, form: MessageFormat, gathers: Gathers) -> None:
        super().__init__(form, None, None)
        self._gathers, self._replicas, self._size = gathers, gathers.replicas, gathers.size
        self.senders: Future[list[int]] | None = None

    def send(self, entries: Sequence[Entries]) -> None:
        """As of `Exchange`; the device is waited for, as for any message that gloo sends."""
        packed = self._form.pack(entries)
        message = packed.cpu()
        self.bytes_sent = message.nbytes
        gathered = self._gathers.gather(message)
        agreed = self._gathers.gather(lambda: self._opinion(gathered.result()), everyone=True)
        check: Future[dict[int, str]] = Future()
        senders: Future[list[int]] = Future()
        agreed.add_done_callback(lambda _: self._conclude(gathered, agreed, check, senders))
        self.senders = senders
        pending = _Arriving(senders, packed.device, gathered, self._size)
        self._under_way.append((pending, check))

    def _opinion(self, gathered: Gathered) -> Tensor:
        """What this rank can say of each replica's message: uint8 `[replicas]`."""
        opinion = torch.full((self._replicas,), _MISSING, dtype=torch.uint8)
        faults = self._form.faults(gathered.rows)
        for row, rank in enumerate(gathered.ranks):
            opinion[rank // self._size] = _FAULTY if row in faults else _GOOD
        return opinion

    def _conclude(
        self,
        gathered: Future[Gathered],
        agreed: Future[Gathered],
        check: Future[dict[int, str]],
        senders: Future[list[int]],
    ) -> None:
        """What all ranks make of all opinions: the same everywhere."""
        try:
            opinions, messages = agreed.result(), gathered.result()
            missing = opinions.rows.eq(_MISSING).any(dim=0)
            faulty = opinions.rows.eq(_FAULTY)
            kept = [r // self._size for r in messages.ranks if not missing[r // self._size]]
            own = self._form.faults(messages.rows) if faulty.any() else {}
            refused: dict[int, str] = {}
            for row, replica in enumerate(kept):
                if faulty[:, replica].any():
                    by = [opinions.ranks[at] for at in faulty[:, replica].nonzero().view(-1)]
                    place = next(
                        at for at, r in enumerate(messages.ranks) if r // self._size == replica
                    )
                    who = f"it has arrived damaged at rank {', '.join(map(str, by))}"
                    refused[row] = own.get(place, who)
            senders.set_result(kept)
            check.set_result(refused)
        except Exception as error:  # whoever waits raises it
            for future in (senders, check):
                if not future.done():
                    future.set_exception(error)
