"""`psyche-fast estimate`: the link that it is told of, and what it says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from psyche_fast.core.estimate import Estimate
from psyche_fast.links import Link
from psyche_fast.metrics.formatting import format_bytes, format_count
from psyche_fast.rank.choice import Over, chosen
from psyche_fast.rank.costs import Costs
from psyche_fast.start.probe import ask, is_host


def parse_bandwidth(text: str, flag: str = "--bandwidth") -> float:
    """Bits per second of `100Mbit` and the like.

    Raises:
        ValueError: another form.
    """
    try:
        return Link.parse(f"{text},0s").up
    except ValueError:
        raise ValueError(f"{flag}: wanted a rate such as 100Mbit or 1Gbit, got {text!r}") from None


def link_of(
    text: str | None, *, bandwidth: str, uplink: str | None, downlink: str | None, latency_ms: float
) -> Link:
    """The link that `estimate` is told of, or measures.

    Args:
        text: `--link`; the others are looked at where there is none.
        bandwidth: bits in a second, both ways.
        uplink: up, where that is another.
        downlink: likewise down.
        latency_ms: of one way.

    Raises:
        ValueError: one has another form, or the machine that is named does not answer.
    """
    if text is None:
        up = parse_bandwidth(
            bandwidth if uplink is None else uplink, "--uplink" if uplink else "--bandwidth"
        )
        down = parse_bandwidth(bandwidth if downlink is None else downlink, "--downlink")
        return Link(up, down, latency_ms / 1e3)
    return ask(text) if is_host(text) else Link.parse(text)


def as_json(need: Estimate, link: Link) -> dict[str, Any]:
    """All numbers of an estimate by name."""
    fields = {**asdict(need), "memory": need.memory, "link": asdict(link), "link_text": str(link)}
    fields["exchange_seconds"] = 0.0 if need.over is None else need.over.exchange
    return fields


def lines(need: Estimate, link: Link, ranks: int, step: float | None) -> Iterator[str]:
    """An estimate for people.

    Args:
        need: the estimate.
        link: as it was given for it.
        ranks: likewise.
        step: likewise.
    """
    yield f"model       {format_count(need.total_parameters)} parameters"
    parts = ("parameters", "gradients", "optimizer", "activations", "workspace", "unsharded")
    for name in (*parts, "messages") if need.messages else parts:
        yield f"{name:<11} {format_bytes(getattr(need, name)):>8} per rank"
    if need.state:
        each = max(need.elements, 1)
        kinds = ", ".join(f"{kind} {n / each:.3g}" for kind, n in need.state.items() if n)
        total = sum(need.state.values()) / each
        yield f"state       {total:.3g} bytes per parameter and rank: {kinds or 'nothing'}"
    yield f"memory      {format_bytes(need.memory):>8} per rank, at most at one time"
    yield (
        f"snapshot    {format_bytes(need.snapshot):>8} per rank of the host's besides, while a "
        "checkpoint is written"
    )
    if need.rounds is not None and need.over is not None:
        yield from _of_rounds(need, need.rounds, need.over, link, ranks, step)


def _of_rounds(
    need: Estimate, rounds: Costs, over: Over, link: Link, ranks: int, step: float | None
) -> Iterator[str]:
    per_step = sum(rounds.messages) / rounds.every
    less = f"{need.dense / per_step:.3g} times less than a dense exchange"
    if rounds.every == 1:
        yield f"sent        {format_bytes(need.sent):>8} per rank and step, {less}"
    else:
        yield (
            f"sent        {format_bytes(need.sent):>8} per rank and round of {rounds.window} "
            f"steps, {format_bytes(per_step)} per step, {less}"
        )
    for name in ("up", "down"):
        each = getattr(rounds, name)
        yield (
            f"{name:<11} {format_bytes(max(each)):>8} per rank and round over the link, "
            f"{format_bytes(sum(each) / rounds.every)} per step"
        )
    yield f"batch       {format_bytes(need.batch):>8} per replica and step, from the core"
    beside = f"beside {over.delay} steps" if over.delay != 1 else "behind the next step"
    hides = f"it hides {beside}" if over.delay else "nothing goes on beside it"
    yield f"exchange    {over.exchange:.3g} s at {link} for {ranks} ranks of a host; {hides}" + (
        f" of {over.exchange / over.delay:.3g} s and more" if over.delay and step is None else ""
    )
    if step is not None:
        lost = rounds.exposed_seconds(over.exchange, step)
        yield (
            f"step        {step:.3g} s; {over.exchange - lost:.3g} s of an exchange hide, "
            f"{lost:.3g} s a round are lost: {over.loss:.1%} of a step"
        )
    yield from need.table
    if need.chosen is not None:
        yield chosen(need.chosen)
