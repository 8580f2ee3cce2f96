"""`--simulate`: the trainers of all replicas in one process, which take turns with one model.

Each replica has parameters, masters, buffers, optimiser and random numbers of its own; in its turn
the model's tensors are pointed at them, which copies nothing. What it does is what a rank of its
own would: only what goes from replica to replica goes through `Hub`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace

import torch
from torch import Tensor

from psyche_fast.batch import Batch
from psyche_fast.links import Link
from psyche_fast.metrics.formatting import format_duration
from psyche_fast.models import CausalLM
from psyche_fast.rank.clock import Clock
from psyche_fast.rank.hub import Hub
from psyche_fast.rank.state import State
from psyche_fast.rank.topology import Topology
from psyche_fast.rank.trainer import Trainer, TrainOutput, trainable


class Simulated(Trainer):
    """The trainers of all replicas, behind the face of one.

    Args:
        model: at first the model of all of them.
        replicas: how many there are.
        make: makes the trainer of a replica's place, in its turn.
        link: between them, for a virtual clock; None for none.
    """

    def __init__(
        self,
        model: CausalLM,
        replicas: int,
        make: Callable[[Topology], Trainer],
        link: Link | None,
    ) -> None:
        self.model, self.parameters = model, trainable(model)
        self.topology = Topology(replicas=replicas)
        self.stats = {}
        buffers = [b for name, b in model.kept().items() if name.startswith("buffer/")]
        self._pointed = [*self.parameters.values(), *model.masters.values(), *buffers]
        self._sets = [
            [t.detach() if r == 0 else t.detach().clone() for t in self._pointed]
            for r in range(replicas)
        ]
        self._turn = 0
        self._random = [self._random_state() for _ in range(replicas)]
        hub = Hub(replicas)
        places = [
            Topology(replicas=replicas, replica=r, rank=r, peers=hub.peers(r))
            for r in range(replicas)
        ]
        self._trainers = [make(places[r]) for r in self._turns()]
        self.schedule = self._trainers[0].schedule
        self._clock = None if link is None or replicas == 1 else Clock(link)
        self._train_seconds = 0.0

    @property
    def bytes_sent(self) -> int:
        """Bytes of all replicas' contributions to the last exchange."""
        return sum(t.up for one in self._trainers for t in one.transfers)

    @property
    def bytes_received(self) -> int:
        """Bytes that come to all replicas by that exchange."""
        return sum(t.down for one in self._trainers for t in one.transfers)

    @property
    def refusals(self) -> dict[str, dict[str, int]]:
        """As of each replica."""
        return self._trainers[0].refusals

    @property
    def senders(self) -> Future[list[int]] | None:
        """None: the results of all count."""
        return None

    def parts(self) -> Iterator[Trainer]:
        """Each replica's trainer, in its turn."""
        for r in self._turns():
            yield self._trainers[r]

    def train(self, step: int, batch: Batch) -> TrainOutput:
        """As of `Trainer`, of all replicas, each of which has its rows of the batch."""
        count = len(self._trainers)
        began, outputs = self._now(), []
        for r in self._turns():
            outputs.append(self._trainers[r].train(step, batch.share(r, count)))
        self._train_seconds = (self._now() - began) / count
        self.stats = self._trainers[0].stats
        return replace(outputs[0], others=outputs[1:])

    def optimize(self, step: int) -> None:
        """As of `Trainer`, of all replicas."""
        began = self._now()
        stages = [one.stages(step) for one in self._trainers]
        done = False
        while not done:  # all are through a stage before one begins the next
            for r in self._turns():
                done = next(stages[r], True) is True
        seconds = (self._now() - began) / len(stages)
        if self._clock is not None:
            sent = self._trainers[0].transfers
            self.virtual = self._clock.step(self._train_seconds, sent, seconds)

    def begin_at(self, seconds: float) -> None:
        """Have the virtual clock go on from there, where there is one."""
        if self._clock is not None:
            self._clock.seconds = seconds

    def summary(self) -> str | None:
        """What the virtual clock shows, in a line; None without one."""
        if self._clock is None:
            return None
        whole, waited = (format_duration(s) for s in (self._clock.seconds, self._clock.waited))
        return (
            f"virtual  {whole} for replicas over {self._clock.link}; since this start {waited} of "
            "it waiting for exchanges"
        )

    def plain(self) -> None:
        """As of `Trainer`, of all replicas."""
        for one in self.parts():
            one.plain()

    def files(self) -> dict[str, State]:
        """As of `Trainer`: those of all replicas."""
        files: dict[str, State] = {}
        for one in self.parts():
            files |= one.files()
        return files

    def take_snapshot(
        self, step: int, then: Callable[[dict[str, State] | Exception], None]
    ) -> None:
        """As of `Trainer`: the copies of all replicas at once."""
        taken: list[dict[str, State] | Exception] = []

        def collect(files: dict[str, State] | Exception) -> None:
            taken.append(files)
            if len(taken) < len(self._trainers):
                return
            whole: dict[str, State] = {}
            for part in taken:
                if isinstance(part, Exception):
                    return then(part)
                whole |= part
            then(whole)

        for one in self.parts():
            one.take_snapshot(step, collect)

    def drop_snapshot(self) -> bool:
        """As of `Trainer`, of all replicas."""
        dropped = [one.drop_snapshot() for one in self._trainers]
        return any(dropped)

    def zero(self) -> None:
        """As of `Trainer`, of all replicas."""
        for one in self.parts():
            one.zero()

    def begin_check(self, step: int) -> None:
        """As of `Trainer`, of all replicas."""
        for one in self.parts():
            one.begin_check(step)

    def finish_check(self) -> None:
        """As of `Trainer`, of all replicas."""
        for one in self.parts():
            one.finish_check()

    def _turns(self) -> Iterator[int]:
        """Each replica in turn; then it is the first one's again, as wherever there is but one."""
        for r in range(len(self._sets)):
            self._point(r)
            yield r
        self._point(0)

    def _point(self, replica: int) -> None:
        """Have the model be a replica's, and the random numbers too."""
        if replica == self._turn:
            return
        self._random[self._turn] = self._random_state()
        self._turn = replica
        for tensor, own in zip(self._pointed, self._sets[replica], strict=True):
            tensor.data = own
        host, device = self._random[replica]
        torch.set_rng_state(host)
        if device is not None:
            torch.cuda.set_rng_state(device, self.model.device)

    def _random_state(self) -> tuple[Tensor, Tensor | None]:
        device, on_host = self.model.device, torch.get_rng_state()
        return on_host, torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def _now(self) -> float:
        """Seconds, when what is under way on the device is done where a clock counts it."""
        if self._clock is not None and self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return time.perf_counter()
