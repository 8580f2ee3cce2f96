"""What the ranks add up after a step, and read during the step after it."""

from __future__ import annotations

import logging
import math
from concurrent.futures import Future
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from psyche_fast.distro.gathers import Gathered, Gathers
from psyche_fast.rank.trainer import Trainer, TrainOutput

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Counts:
    """A step in numbers.

    Attributes:
        loss: mean over the real tokens of the whole batch whose loss was finite; NaN where there
            are none.
        nonfinite_losses: micro-batches whose loss was not finite, of all replicas.
        refused_gradients: replicas whose gradient was refused because it, or a loss, was not
            finite.
        bytes_sent: what one replica's ranks have sent to other replicas, together.
        bytes_received: what has come to them from other replicas.
    """

    loss: float
    nonfinite_losses: int
    refused_gradients: int
    bytes_sent: int
    bytes_received: int


class Totals:
    """A step's counts on their way: all ranks begin after `train` and `wait` a step later.

    Over a slow link they take as long as several round trips, which no step has to wait for.
    """

    def __init__(self, output: TrainOutput, trainer: Trainer) -> None:
        """Begins to add up over all ranks."""
        self._output = output
        self._topology = trainer.topology
        device = trainer.model.device
        # float64 holds any number of bytes exactly.
        sent = [
            torch.full((), n, dtype=torch.float64, device=device)
            for n in (trainer.bytes_sent, trainer.bytes_received)
        ]
        here = [_sums(one) for one in (output, *output.others)]
        total = torch.cat([torch.stack(here).sum(0), torch.stack(sent)])
        self.replicas: list[int] | None = None
        """After `wait`, in an elastic run: whose results of the step count."""
        self.epoch = 0
        """After `wait`, in an elastic run: the epoch in which that came to be known."""
        self._senders, self._work = trainer.senders, None
        self._gathered: Future[Gathered] | None = None
        peers = self._topology.peers
        if isinstance(peers, Gathers):
            self._sum = total.cpu()
            self._gathered = peers.gather(self._sum.view(torch.uint8), everyone=True)
            return
        group = self._topology.everyone
        # Over gloo from the host: the exchange of results has waited for the device already.
        self._sum = total if group is None else total.cpu()
        self._work = dist.all_reduce(self._sum, group=group, async_op=True)

    def wait(self) -> Counts:
        """Waits for the other ranks and for the device."""
        if self._work is not None:
            self._work.wait()
        replicas = self._topology.replicas
        if self._gathered is not None:
            assert self._senders is not None
            self.replicas = self._senders.result()
            gathered = self._gathered.result()
            assert isinstance(self._topology.peers, Gathers)
            self.epoch = self._topology.peers.epoch
            self._sum = gathered.rows.view(torch.float64).sum(dim=0)
            replicas = len(gathered.ranks) // (self._topology.dp * self._topology.tp)
        loss, kept, left_out, refused, sent, received = self._sum.tolist()
        for output in (self._output, *self._output.others):
            warn_of_refusal(output)
        ranks = self._topology.dp * self._topology.tp
        return Counts(
            loss / kept if kept else math.nan,
            round(left_out / ranks),
            round(refused / ranks),
            round(sent / replicas),
            round(received / replicas),
        )


def _sums(output: TrainOutput) -> Tensor:
    """What is added up of an output: float64 `[4]`."""
    tokens = sum(output.row_tokens)
    here = (output.loss * tokens, output.kept * tokens, output.nonfinite_losses, output.refused)
    return torch.stack([t.double() for t in here])


def warn_of_refusal(output: TrainOutput) -> None:
    """Says that this rank's gradient was refused, if it was; waits for the device."""
    if output.refused:
        log.warning("step %d: the gradient is not finite and is refused", output.step)
