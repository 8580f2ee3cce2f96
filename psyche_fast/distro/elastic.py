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
from psyche_fast.distro.verdict import OPINION, Standing, Verdict, judge, left_out, opinion
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
        bytes_received: of the others' messages that were received last.
        senders: whose results of the last step that was sent will count or be refused.
    """

    def __init__(self, form: MessageFormat, gathers: Gathers) -> None:
        super().__init__(form, None, None)
        self._gathers, self._size = gathers, gathers.size
        self.others, self.standing = gathers.replicas - 1, Standing(gathers.replicas)
        self.senders: Future[list[int]] | None = None
        self._found: dict[int, dict[int, str]] = {}

    def send(self, entries: Sequence[Entries]) -> None:
        """As of `Exchange`; the device is waited for, as for any message that gloo sends."""
        number = self.number
        self.number += 1
        packed = self._form.pack(entries, number, self._gathers.rank // self._size)
        message = packed.cpu()
        self.bytes_sent = message.nbytes
        gathered = self._gathers.gather(message)
        agreed = self._gathers.gather(
            lambda: self._opinion(gathered.result(), number), everyone=True
        )
        check: Future[Verdict] = Future()
        senders: Future[list[int]] = Future()
        agreed.add_done_callback(lambda _: self._conclude(gathered, agreed, check, senders, number))
        self.senders = senders
        pending = _Arriving(senders, packed.device, gathered, self._size)
        self._under_way.append((pending, check, number))

    def _take(self) -> list[Entries] | None:
        if self._unpacking is None:
            self._unpack()
        assert self._unpacking is not None
        self.bytes_received = max(len(self._unpacking[2]) - 1, 0) * self.bytes_sent
        return super()._take()

    def _opinion(self, gathered: Gathered, number: int) -> Tensor:
        """What this rank can say of each replica's message: uint8 `[replicas * OPINION]`."""
        senders = [rank // self._size for rank in gathered.ranks]
        pauses = self.standing.left_out(number)
        found = self._form.faults(gathered.rows, number, senders)
        unseen = {row for row, sender in enumerate(senders) if sender in pauses}
        found |= self._form.decode(gathered.rows, found.keys() | unseen)[1]
        self._found[number] = {senders[row]: why for row, why in found.items()}
        said = torch.zeros((self._gathers.replicas, OPINION), dtype=torch.uint8)
        said[:, 0] = _MISSING
        for row, sender in enumerate(senders):
            said[sender] = opinion(gathered.rows[row], _FAULTY if row in found else _GOOD)
        return said.view(-1)

    def _conclude(
        self,
        gathered: Future[Gathered],
        agreed: Future[Gathered],
        check: Future[Verdict],
        senders: Future[list[int]],
        number: int,
    ) -> None:
        """What all ranks make of all opinions: the same everywhere."""
        try:
            opinions, messages = agreed.result(), gathered.result()
            found = self._found.pop(number, {})
            said = opinions.rows.view(len(opinions.ranks), -1, OPINION)
            missing = said[:, :, 0].eq(_MISSING).any(dim=0)
            kept = [r // self._size for r in messages.ranks if not missing[r // self._size]]
            pauses, offenders = self.standing.left_out(number), set()
            refused: dict[int, str] = {}
            for row, sender in enumerate(kept):
                if sender in pauses:
                    refused[row] = left_out(pauses[sender])
                    continue
                judgement = judge(said[:, sender], opinions.ranks, sender, self._size, _FAULTY)
                if (why := judgement.why(found.get(sender))) is not None:
                    refused[row] = why
                if judgement.offends:
                    offenders.add(sender)
            self._note(number, offenders)
            unseen = frozenset(row for row, sender in enumerate(kept) if sender in pauses)
            senders.set_result(kept)
            check.set_result(Verdict(refused, unseen))
        except Exception as error:  # whoever waits raises it
            for future in (senders, check):
                if not future.done():
                    future.set_exception(error)
