"""What methods cost over a link, and the settings of one by which its exchange hides.

An exchange hides where it takes at most `_MARGIN` of the compute that goes on beside it, which are
`delay` steps. Settings that the user has given stay. Of the others those are taken that are
nearest to the method's own, in this order: as many entries per chunk as it has (never more), then
as few local steps, from a sixth of its own to four times as many, at least `_ROUND` times the delay
in a round. Where nothing hides, what loses least.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from psyche_fast.config import RunConfig
from psyche_fast.links import Link
from psyche_fast.methods import Method, get
from psyche_fast.methods.presets import PRESETS
from psyche_fast.metrics.formatting import format_bytes
from psyche_fast.options import flag
from psyche_fast.rank.costs import Costs, costs_of
from psyche_fast.rank.method import method_of

_MARGIN = 0.9
_ROUND = 4
_LOSS = 0.05
"""The most of a step that is lost where nothing can go on beside an exchange."""
_FEWEST, _MOST = 1 / 6, 4
_LEAST_TOPK = 8
"""Of local steps' entries per chunk."""

CHOSEN = ("topk", "every", "delay", "mix", "compression_topk")
"""The options that are chosen for a link."""


@dataclass(frozen=True)
class Over:
    """A method over a link.

    Attributes:
        name: the method's.
        changes: options that have been chosen, by name.
        every: its inner steps until each fragment has had its turn.
        delay: inner steps that go on beside an exchange.
        sent: bytes that a host sends in its largest round.
        received: that it receives.
        exchange: seconds of that round's exchange.
        loss: time lost, as a share of a step; None where a step's time is not known.
    """

    name: str
    changes: dict[str, Any]
    every: int
    delay: int
    sent: int
    received: int
    exchange: float
    loss: float | None

    @property
    def says(self) -> str:
        """Its line of a table."""
        lost = "" if self.loss is None else f"{self.loss:.1%}" if self.loss else "nothing"
        return (
            f"{self.name:<17} {self.every:>5} {self.delay:>5} {format_bytes(self.sent):>10} "
            f"{format_bytes(self.received):>10} {self.exchange:>9.3g} s {lost}".rstrip()
        )


HEAD = f"{'method':<17} {'every':>5} {'delay':>5} {'up':>10} {'down':>10} {'exchange':>11} lost"
"""Of the table."""


@dataclass(frozen=True)
class Place:
    """Where an exchange takes place.

    Attributes:
        run: its replicas and options.
        parameters: a rank's trainable ones by name.
        link: of each host.
        step: seconds of a step without exchanges; None where that is not known.
        ranks: of a host, which share its link.
    """

    run: RunConfig
    parameters: Mapping[str, Tensor]
    link: Link
    step: float | None
    ranks: int = 1

    def over(self, name: str, run: RunConfig, method: Method | None, **changes: Any) -> Over:
        """A method over the link; None is DisTrO as the run's own options have it."""
        costs = costs_of(run, self.parameters, method)
        exchange = costs.exchange_seconds(self.link, self.ranks)
        loss = None if self.step is None else costs.loss(exchange, self.step)
        return Over(
            name, changes, costs.every, costs.delay, self.ranks * max(costs.up),
            self.ranks * max(costs.down), exchange, loss,
        )  # fmt: skip


def table(place: Place) -> list[str]:
    """Lines of what each named method costs with its own settings."""
    lines = [HEAD]
    for name in PRESETS:
        try:
            lines.append(place.over(name, place.run, get(name)).says)
        except ValueError as error:  # too few layers for its fragments
            lines.append(f"{name:<17} {error}")
    return lines


def choose(place: Place) -> Over:
    """Settings for the run's method.

    Args:
        place: with the time of a step.

    Raises:
        ValueError: options that do not go together.
    """
    assert place.step is not None
    run = place.run
    name = "distro" if run.optimizer.distro else run.exchange.method
    assert name is not None
    tried: list[Over] = []
    for changes in _settings(place):
        changed = run.replace(**changes)
        found = place.over(name, changed, method_of(changed), **changes)
        if _hides(found, place.step):
            return found
        tried.append(found)
    # Fewer entries cost too, and a link that is far away stays so.
    least = min(1.0 + _loss(found) for found in tried)
    return next(found for found in tried if 1.0 + _loss(found) <= (1.0 + _LOSS) * least)


def _loss(found: Over) -> float:
    assert found.loss is not None, "the time of a step is known"
    return found.loss


def _hides(found: Over, step: float) -> bool:
    if found.delay:
        return found.exchange <= _MARGIN * found.delay * step
    return _loss(found) <= _LOSS


def _settings(place: Place) -> Iterator[dict[str, Any]]:
    """What may be chosen, the best first."""
    run, method = place.run, method_of(place.run)
    if method is None:
        yield from ({"compression_topk": k} for k in _fewer(run.optimizer.compression_topk, 1))
        return
    ks: list[int | None] = [None]
    if method.select != "all" and run.exchange.topk is None:
        ks = list(_fewer(method.k, min(_LEAST_TOPK, method.k) if method.is_local else 1))
    for k in ks:
        changes = {} if k is None else {"topk": k}
        if method.is_local:
            yield from _local(place, method, changes)
        else:
            yield changes


def _fewer(most: int, least: int) -> Iterator[int]:
    """From `most` to `least`, each about a fifth less than the one before."""
    k = most
    while k > least:
        yield k
        k = max(least, min(k - 1, k * 4 // 5))
    yield k


def _local(place: Place, method: Method, changes: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Local steps and delay, for so many entries per chunk."""
    run, step = place.run, place.step
    assert step is not None
    options, parts = run.exchange, method.fragments
    changed = run.replace(**changes)
    costs: Costs = costs_of(changed, place.parameters, method_of(changed))
    exchange = costs.exchange_seconds(place.link, place.ranks)
    beside = max(1, math.ceil(exchange / (_MARGIN * step)))
    delay = beside if options.delay is None else options.delay
    if options.every is not None:
        every = method.every
        delay = min(delay, method.window - 1)
    else:
        own = get(str(options.method)).every
        blocking = math.ceil(exchange / (_LOSS * step)) if delay == 0 else 0
        window = max(_ROUND * delay, blocking, math.ceil(own * _FEWEST / parts))
        most = max(parts, min(own * _MOST, run.schedule.total_steps))
        every = _dividing(min(window * parts, most - most % parts), parts, most, run)
        delay = min(delay, every // parts - 1)
    found = {**changes, "every": every, "delay": delay}
    if options.mix is None and delay and method.mix == 0.0:
        found["mix"] = "rebase"
    yield found


def _dividing(least: int, parts: int, most: int, run: RunConfig) -> int:
    """From `least` to a quarter more: the first of which the run's steps are a multiple."""
    for every in range(least, min(most, least + least // 4) + 1, parts):
        if run.schedule.total_steps % every == 0:
            return every
    return least


def chosen(found: Over) -> str:
    """A line for the user: the settings as flags."""
    flags = " ".join(f"{flag(name)} {value}" for name, value in found.changes.items())
    lost = found.loss
    assert lost is not None
    much = "which hides behind compute" if not lost else f"which costs {lost:.1%} of a step"
    return (
        f"chosen   {flags or 'nothing: all is given'} for {found.name}: "
        f"{format_bytes(found.sent)} up a round, {found.exchange:.3g} s, {much}"
    )
