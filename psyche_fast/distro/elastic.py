"""Results between replicas that may come and go: `Exchange` on gathers that outlive a peer."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import Tensor

from psyche_fast.distro.exchange import Exchange
from psyche_fast.distro.gathers import Gathered, Gathers
from psyche_fast.distro.message import MessageFormat, Unpacking
from psyche_fast.distro.verdict import DIGEST, Standing, Verdict, conclude, opinion
from psyche_fast.kernels.plan import Entries

log = logging.getLogger(__name__)

_MISSING = 255


@dataclass
class _Arriving:
    """Messages under way, and what this rank thinks of them once they are there."""

    number: int
    gathered: Future[Gathered]
    device: torch.device
    check: Future[Verdict] = field(default_factory=Future)
    senders: Future[list[int]] = field(default_factory=Future)
    faults: dict[int, str] = field(default_factory=dict)
    pauses: frozenset[int] = frozenset()
    decoded: Unpacking | None = None

    def wait(self) -> Tensor:
        return self.gathered.result().rows.to(self.device, non_blocking=True)


class ElasticExchange(Exchange):
    """`Exchange` between replicas that may come and go.

    What all ranks have of a step counts, with the mean over those who sent it. A message that
    some place of a replica got out before it died and another did not counts nowhere: what
    tensor parallelism replicates has to stay every rank's.

    Args:
        form: how results travel.
        gathers: between the ranks.

    Attributes:
        senders: whose results of the last step that was sent count, or are refused.
    """

    def __init__(self, form: MessageFormat, gathers: Gathers) -> None:
        super().__init__(form, None, None)
        self._gathers, self._size = gathers, gathers.size
        self.standing = Standing(gathers.replicas)
        self.senders: Future[list[int]] | None = None

    def send(self, entries: Sequence[Entries]) -> None:
        """As of `Exchange`; the device is waited for, as for any message that gloo sends."""
        own = self._gathers.rank // self._size
        packed = self._form.pack(entries, self.number, own)
        message = packed.cpu()
        self.bytes_sent = message.nbytes
        arriving = _Arriving(self.number, self._gathers.gather(message), packed.device)
        agreed = self._gathers.gather(lambda: self._opinions(arriving), everyone=True)
        agreed.add_done_callback(lambda opinions: self._conclude(arriving, opinions))
        self.senders = arriving.senders
        self._under_way.append((arriving, arriving.check, self.number))
        self.number += 1

    def _opinions(self, arriving: _Arriving) -> Tensor:
        """What this rank says of each replica's message: uint8 `[replicas * (1 + digest)]`."""
        gathered = arriving.gathered.result()
        whose = [rank // self._size for rank in gathered.ranks]
        until = self.standing.left_out(arriving.number)
        paused = {
            row: f"it is left out before exchange {until[replica]}"
            for row, replica in enumerate(whose)
            if replica in until
        }
        faults = {**self._form.faults(gathered.rows, arriving.number, whose), **paused}
        arriving.decoded, further = self._form.decode(gathered.rows, faults)
        arriving.faults, arriving.pauses = faults | further, frozenset(paused)
        said = torch.full((self._gathers.replicas, 1 + DIGEST), _MISSING, dtype=torch.uint8)
        for row, replica in enumerate(whose):
            said[replica] = opinion(gathered.rows[row], refused=row in arriving.faults)
        return said.view(-1)

    def _conclude(self, arriving: _Arriving, agreed: Future[Gathered]) -> None:
        """What all ranks make of all opinions: the same everywhere; in the order of exchanges."""
        try:
            said, gathered = agreed.result(), arriving.gathered.result()
            opinions = said.rows.view(len(said.ranks), self._gathers.replicas, 1 + DIGEST)
            whose = [rank // self._size for rank in gathered.ranks]
            lacking = opinions[:, :, 0].eq(_MISSING).any(dim=0).tolist()
            kept = [row for row, replica in enumerate(whose) if not lacking[replica]]
            replicas = [whose[row] for row in kept]
            own = {
                at: arriving.faults[row] for at, row in enumerate(kept) if row in arriving.faults
            }
            found, offenders = conclude(
                own, opinions[:, replicas], len(kept), replicas, said.ranks, self._size
            )
            missing = frozenset(range(len(whose))) - {*kept}
            refused = {kept[at]: what for at, what in found.items()}
            refused |= dict.fromkeys(missing, "not all have got it")
            self._note(arriving.number, offenders - {whose[row] for row in arriving.pauses})
            decoded = arriving.decoded
            if decoded is not None and {*decoded.rows} != {*range(len(whose))} - refused.keys():
                decoded = self._form.begin_unpack(gathered.rows, leave_out=refused)
            arriving.decoded = None
            arriving.senders.set_result(replicas)
            arriving.check.set_result(
                Verdict(refused, arriving.pauses | missing, decoded, whose, missing)
            )
        except Exception as error:  # whoever waits raises it
            for future in (arriving.senders, arriving.check):
                if not future.done():
                    future.set_exception(error)
