"""Replicas that lie, between real groups: what they send is refused by all, and then they are."""

from __future__ import annotations

import logging
import struct
from collections.abc import Callable
from concurrent.futures import Future
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from psyche_fast.distro import exchange
from psyche_fast.distro.elastic import ElasticExchange
from psyche_fast.distro.exchange import Exchange
from psyche_fast.distro.gathers import Gathered, Gathers
from psyche_fast.distro.message import MessageFormat, find_outliers
from psyche_fast.distro.verdict import Standing, conclude
from tests.distro.test_message import HEADER, form, layout, random_entries, resealed
from tests.groups import run_ranks

SHAPES = {"a": (64, 64), "b": (32, 8), "c": (40,)}
# What a rank hands to the exchange in place of its message: from its form, the number of the
# exchange, and what it has sent before.
Lie = Callable[[MessageFormat, int, Tensor, list[Tensor]], Tensor]


def changed(at: int, content: bytes) -> Lie:
    def lie(form: MessageFormat, number: int, own: Tensor, before: list[Tensor]) -> Tensor:
        own[at : at + len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        return resealed(own)

    return lie


def value(number: float) -> Lie:
    """Of the first entry: values come first."""
    return changed(HEADER, struct.pack("<f", number))


def bits(pick: Callable[[int], Tensor]) -> Lie:
    """Other indices, whatever their code makes of it; behind the values."""

    def lie(form: MessageFormat, number: int, own: Tensor, before: list[Tensor]) -> Tensor:
        plan, size = form._plans[0], form._sizes[0]
        at = HEADER + plan.chunks * plan.k * 4
        own[at : HEADER + size] = pick(size - (at - HEADER))
        return resealed(own)

    return lie


def swapped(form: MessageFormat, number: int, own: Tensor, before: list[Tensor]) -> Tensor:
    """Entries that are in no order: the code takes any indices, from whoever writes them."""
    entries = [type(e)(e.indices.flip(1), e.values) for e in random_entries(layout(SHAPES), 1)]
    return form.pack(entries, number, 1)


def twice(form: MessageFormat, number: int, own: Tensor, before: list[Tensor]) -> Tensor:
    entries = random_entries(layout(SHAPES), 1)
    for e in entries:
        e.indices[:, 1:] = e.indices[:, :1]
    return form.pack(entries, number, 1)


def replayed(form: MessageFormat, number: int, own: Tensor, before: list[Tensor]) -> Tensor:
    return before[-1]


def anothers(form: MessageFormat, number: int, own: Tensor, before: list[Tensor]) -> Tensor:
    return form.pack(random_entries(layout(SHAPES), 0), number, 0)


def noise(form: MessageFormat, number: int, own: Tensor, before: list[Tensor]) -> Tensor:
    return torch.randint(0, 256, own.shape, dtype=torch.uint8)


def noise_that_is_sealed(
    form: MessageFormat, number: int, own: Tensor, before: list[Tensor]
) -> Tensor:
    own[HEADER:] = torch.randint(0, 256, own[HEADER:].shape, dtype=torch.uint8)
    return resealed(own)


LIES: dict[str, tuple[Lie, str]] = {
    "magic": (changed(0, b"X"), "magic"),
    "version": (changed(4, b"\2"), "version 2, wanted 3"),
    "kind": (changed(6, b"\0"), "kind of values 0, wanted 32"),
    "unused": (changed(7, b"\1"), "bytes set that should be 0"),
    "size": (changed(8, b"\xff"), "size"),
    "layout": (changed(16, b"otherlay"), "layout hash"),
    "definition": (changed(24, b"otherdef"), "definition hash"),
    "number": (changed(32, b"\7"), "it is of exchange 7, wanted 1"),
    "a huge number": (changed(32, b"\xff" * 8), "it is of exchange -1, wanted 1"),
    "sender": (changed(40, b"\0"), "it is replica 0's, not its own"),
    "a sender that is not there": (changed(40, b"\x63"), "it is replica 99's, not its own"),
    "NaN": (value(float("nan")), "not finite"),
    "infinity": (value(float("-inf")), "not finite"),
    "no index": (bits(lambda n: torch.zeros(n, dtype=torch.uint8)), "out of order or range"),
    "every index": (bits(lambda n: torch.full((n,), 255, dtype=torch.uint8)), "out of order"),
    "in no order": (swapped, "out of order"),
    "twice the same": (twice, "out of order"),
    "the last step's": (replayed, "it is of exchange 0, wanted 1"),
    "another's": (anothers, "it is replica 0's, not its own"),
    "noise": (noise, "its header has the magic"),
    "sealed noise": (noise_that_is_sealed, "out of order or range"),
    "huge": (value(1e30), "times the others' median"),
}


def said_here() -> list[str]:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("psyche_fast").addHandler(handler)
    return said


def liar(shape: MessageFormat, lie: Lie | None) -> Callable[..., object]:
    """`exchange.start` with another message than the first."""
    sent: list[Tensor] = []
    start = exchange.start

    def lying(message: Tensor, peers: dist.ProcessGroup) -> object:
        if lie is not None and sent:
            message = lie(shape, len(sent), message.clone(), sent)
        sent.append(message)
        return start(message, peers)

    return lying


def _lie(rank: int) -> dict[str, tuple[object, ...]]:
    torch.manual_seed(rank)
    of, said, found = layout(SHAPES), said_here(), {}
    agreement = dist.new_group(backend="gloo")
    for name, (lie, _) in LIES.items():
        shape = MessageFormat(of, ["torch"] * len(of.plans), signs=False, outliers=6.0)
        tested = Exchange(shape, dist.group.WORLD, agreement)
        with mock.patch.object(exchange, "start", liar(shape, lie if rank == 1 else None)):
            for _ in range(2):
                tested.send(random_entries(of, rank))
        assert tested.receive() is not None
        assert tested.refused == {}
        said.clear()
        entries = tested.receive()
        assert entries is not None
        found[name] = (tested.refused, list(said), [e.indices.tolist() for e in entries])
    return found


@pytest.mark.processes
def test_every_lie_is_refused_by_all() -> None:
    zero, one, two = run_ranks(_lie, 3)
    honest = [random_entries(layout(SHAPES), seed) for seed in (0, 2)]
    kept = [
        torch.cat([h[at].indices for h in honest], dim=1).tolist() for at in range(len(honest[0]))
    ]
    for name, (_, why) in LIES.items():
        for found in (zero, one, two):
            refused, said, indices = found[name]
            assert refused == {1: 1}, name
            (line,) = said
            assert line.startswith("the result of replica 1 is refused: "), name
            assert why in line, name
            assert indices == kept, name


def _tells_each_another(rank: int) -> tuple[object, list[str]]:
    """Rank 2 gets something else from rank 1, as good as what rank 0 gets."""
    of, said = layout(SHAPES), said_here()
    tested = Exchange(form(of, signs=True), dist.group.WORLD, dist.new_group(backend="gloo"))
    host = exchange.Pending.host

    def other(self: exchange.Pending) -> Tensor:
        messages = host(self).clone()
        if rank == 2:
            messages[1] = tested._form.pack(random_entries(of, 9), 0, 1)
        return messages

    with mock.patch.object(exchange.Pending, "host", other):
        tested.send(random_entries(of, rank))
        tested.receive()
    return tested.refused, said


@pytest.mark.processes
def test_who_tells_one_this_and_another_that_is_not_believed() -> None:
    for refused, said in run_ranks(_tells_each_another, 3):
        assert refused == {1: 1}
        assert said == ["the result of replica 1 is refused: not all have got the same from it"]


def _again_and_again(rank: int) -> list[tuple[dict[int, int], dict[int, int], int]]:
    of, found = layout({"a": (8, 8)}), []
    said_here()
    tested = Exchange(form(of, signs=True), dist.group.WORLD, dist.new_group(backend="gloo"))
    pack = MessageFormat.pack

    def damaged(self: MessageFormat, entries: object, number: int, sender: int) -> Tensor:
        message = pack(self, entries, number, sender)  # type: ignore[arg-type]
        if rank == 1 and not 3 <= number < 53:  # while it is left out it tells the truth
            message[0] ^= 1
        return message

    with mock.patch.object(MessageFormat, "pack", damaged):
        for _ in range(2 * 3 + 50 + 3):
            tested.send(random_entries(of, rank))
            entries = tested.receive()
            peers = 0 if entries is None else entries[0].indices.shape[1] // of.plans[0].k
            found.append((tested.refused, tested.left_out, peers))
    return found


@pytest.mark.processes
def test_a_replica_that_goes_on_lying_is_left_out_for_longer_and_longer() -> None:
    for found in run_ranks(_again_and_again, 2):
        assert [refused for refused, _, _ in found] == [{1: 1}] * len(found)
        assert {peers for *_, peers in found} == {1}
        steps = [left.get(1, 0) for _, left, _ in found]
        assert steps[:2] == [0, 0]
        assert steps[2:53] == list(range(51, 0, -1)), "the third time, and fifty more"
        assert steps[53:55] == [0, 0], "looked at again"
        assert steps[55] == 101, "and twice as many"


class Member(Gathers):
    """One of the ranks of an elastic run that are all in this process."""

    def __init__(self, rank: int, of: dict[int, list[tuple[object, Future[Gathered]]]]) -> None:
        self.replicas, self.size, self.rank, self.epoch = 4, 1, rank, 0
        self._of = of
        self.arrives = lambda number, rows: rows
        of[rank] = []

    def gather(
        self, sent: Tensor | Callable[[], Tensor], *, everyone: bool = False
    ) -> Future[Gathered]:
        future: Future[Gathered] = Future()
        self._of[self.rank].append((sent, future))
        number = len(self._of[self.rank]) - 1
        if all(len(asked) > number for asked in self._of.values()):
            now = [asked[number] for asked in self._of.values()]
            rows = torch.stack([s() if callable(s) else s for s, _ in now])  # type: ignore[misc]
            for _, asked in now[:-1]:
                asked.set_result(Gathered(list(self._of), rows))
            # What arrives at the one that asks last may differ.
            now[-1][1].set_result(Gathered(list(self._of), self.arrives(number, rows)))
        return future


def test_elastic_replicas_that_lie_are_left_out_by_all_who_are_there() -> None:
    of, asked = layout({"a": (8, 8)}), {}
    ranks = {rank: ElasticExchange(form(of, signs=True), Member(rank, asked)) for rank in (0, 1, 3)}
    pack = MessageFormat.pack

    def damaged(self: MessageFormat, entries: object, number: int, sender: int) -> Tensor:
        message = pack(self, entries, number, sender)  # type: ignore[arg-type]
        if sender == 1 and number < 3:
            message[0] ^= 1
        return message

    with mock.patch.object(MessageFormat, "pack", damaged):
        for number in range(3 + 50 + 2):
            for rank, tested in ranks.items():
                tested.send(random_entries(of, rank))
            good = [0, 1, 3] if number >= 53 else [0, 3]
            honest = [random_entries(of, rank)[0].indices for rank in good]
            for tested in ranks.values():
                entries = tested.receive()
                assert entries is not None
                assert torch.equal(entries[0].indices, torch.cat(honest, dim=1)), number
                assert tested.refused == ({1: 1} if number < 53 else {})
                assert tested.left_out == ({1: 53 - number} if 2 <= number < 53 else {})


@pytest.mark.parametrize("damaged", [True, False])
def test_what_arrives_otherwise_at_one_elastic_rank_all_leave_out(
    damaged: bool, caplog: pytest.LogCaptureFixture
) -> None:
    of, asked, shape = layout({"a": (8, 8)}), {}, form(layout({"a": (8, 8)}), signs=True)
    members = {rank: Member(rank, asked) for rank in (0, 1, 3)}

    def arrives(number: int, rows: Tensor) -> Tensor:
        if number != 0:
            return rows
        rows = rows.clone()
        if damaged:
            rows[1, HEADER] ^= 1
        else:
            rows[1] = shape.pack(random_entries(of, 9), 0, 1)
        return rows

    members[3].arrives = arrives
    ranks = {rank: ElasticExchange(form(of, signs=True), own) for rank, own in members.items()}
    for rank, tested in ranks.items():
        tested.send(random_entries(of, rank))
    honest = torch.cat([random_entries(of, rank)[0].indices for rank in (0, 3)], dim=1)
    for rank, tested in ranks.items():
        caplog.clear()
        entries = tested.receive()
        assert entries is not None
        assert torch.equal(entries[0].indices, honest)
        assert tested.refused == {1: 1}
        why = "not all have got the same from it"
        if damaged:
            why = "its checksum" if rank == 3 else "it has arrived damaged at rank 3"
        assert f"the result of replica 1 is refused: {why}" in caplog.text


def test_the_standing_is_taken_up_again_and_forgets() -> None:
    one, other = Standing(3), Standing(4)
    for number in (0, 50, 100):  # the first is too long ago by then
        assert one.note(number, {1}) == {}
    assert one.note(120, {1, 2}) == {1: 171}
    other.load(one.state())
    for number, offenders in ((171, {1}), (172, {1, 2}), (173, {1}), (200, {2})):
        assert one.left_out(number) == other.left_out(number)
        assert one.note(number, offenders) == other.note(number, offenders)
    assert one.left_out(201) == {1: 274, 2: 251}
    assert one.left_out(251) == {1: 274}
    few = Standing(1)
    few.load(one.state())
    assert few.left_out(0) == {}


def opinions(rows: list[list[tuple[int, int]]]) -> Tensor:
    """Of each rank on each sender: whether it refuses, and what it has got."""
    return torch.tensor([[[r, *[g] * 16] for r, g in row] for row in rows], dtype=torch.uint8)


def test_one_rank_alone_makes_nobody_an_offender() -> None:
    """It may be the link; and who accuses others falsely has no votes but his own."""
    good = [(0, 7)] * 4
    accuser = [(1, 7)] * 3 + [(0, 7)]
    refused, offenders = conclude({}, opinions([good, good, good, accuser]), 4)
    assert refused == dict.fromkeys((0, 1, 2), "it has arrived damaged at rank 3")
    assert offenders == set()
    # Of the others, more than half: what it says of itself does not count.
    refused, offenders = conclude({1: "why"}, opinions([[(0, 7), (1, 7)], [(0, 7), (0, 7)]]), 2)
    assert (refused, offenders) == ({1: "why"}, {1})


def test_shards_are_compared_among_themselves() -> None:
    """Ranks of different places get different messages, and refuse for all places."""
    first, second = [(0, 1), (0, 2)], [(0, 3), (0, 4)]
    assert conclude({}, opinions([first, second, first, second]), 2) == ({}, set())
    spoilt = [(0, 3), (1, 4)]
    refused, offenders = conclude({}, opinions([first, spoilt, first, second]), 2)
    assert (list(refused), offenders) == ([1], {1})


@pytest.mark.parametrize(
    ("norms", "out"),
    [
        ([1.0, 1.02, 50.0], [2]),
        ([1.0, 2.0, 1.5, 0.7, 1.1], []),
        ([1.0, 1.0, 1.0, 1.2], []),  # equal norms are no measure of what is usual
        ([1.0, 1.0, 1.0, 2.0], [3]),
        ([1.0, 1.0, 0.0], []),  # too small does no harm
        ([0.0, 0.0, 0.0], []),
        ([1.0, 1e30], []),  # of two nobody can tell
        ([1.0, 1.1, 0.9, 1e9, 1e9], [3, 4]),
    ],
)
def test_outliers(norms: list[float], out: list[int]) -> None:
    assert list(find_outliers(np.array(norms), 6.0)) == out
