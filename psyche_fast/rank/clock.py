"""The time that replicas would have taken over a link, where they take turns on one device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from psyche_fast.links import GATHERED_WAYS, Link


@dataclass(frozen=True)
class Transfer:
    """What a rank sends to other replicas and gets from them for one result.

    Attributes:
        up: bytes.
        down: bytes.
        delay: steps from sending to the step whose end waits for the result.
        ways: how often something goes from one end to the other until the result is there.
        counts: whether it goes over the link that the clock is for.
    """

    up: int
    down: int
    delay: int
    ways: int = GATHERED_WAYS
    counts: bool = True


class Clock:
    """Adds up steps: what one replica computes, and what it waits for at its link.

    What is sent goes over the link one after the other, each after the backward that it comes from;
    computing goes on until a result is to be applied. Messages that were in flight when a run was
    resumed count as there.

    Args:
        link: of each replica.
        seconds: what the steps before have taken.

    Attributes:
        link: as given.
        seconds: what all steps have taken.
        waited: what of it an exchange was waited for since this was made.
    """

    def __init__(self, link: Link, seconds: float = 0.0) -> None:
        self.link, self.seconds, self.waited = link, seconds, 0.0
        self._free = 0.0
        self._step = 0
        self._flying: list[tuple[int, float]] = []

    def step(self, train: float, sent: Sequence[Transfer], optimize: float) -> dict[str, float]:
        """Takes up a step.

        Args:
            train: seconds of one replica's forward, backward and what comes before the exchange.
            sent: what the step has sent.
            optimize: seconds of applying results.

        Returns:
            Fields of `metrics.jsonl`: seconds of all steps, of this one, and of these what an
            exchange was waited for.
        """
        link, began, now = self.link, self.seconds, self.seconds + train
        for transfer in (t for t in sent if t.counts):
            moved = link.seconds(transfer.up, transfer.down, ways=0)
            self._free = max(self._free, now) + moved
            arrives = self._free + transfer.ways * link.latency
            self._flying.append((self._step + transfer.delay, arrives))
        due = [arrives for step, arrives in self._flying if step <= self._step]
        self._flying = [(step, arrives) for step, arrives in self._flying if step > self._step]
        waited = max([now, *due]) - now
        self.seconds = now + waited + optimize
        self.waited += waited
        self._step += 1
        return {
            "virtual_seconds": self.seconds,
            "virtual_step_seconds": self.seconds - began,
            "virtual_wait_seconds": waited,
        }
