"""Results that owners merge: as an all-gather's, the same on all, and counted."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from psyche_fast import methods as m
from psyche_fast.distro import exchange
from psyche_fast.methods import exchanges
from psyche_fast.methods.chunked import cut
from psyche_fast.methods.owners import Owners, are_owned, sizes_of
from psyche_fast.methods.traffic import traffic
from tests.groups import run_ranks
from tests.methods.test_replica import METHODS, SHAPES, World, gradient, parameters

STEPS = 3
FORMS = {
    "diloco": m.get("diloco", every=2, chunk=8, values="8bit", delay=1),
    "muloco": m.get("muloco", every=1, chunk=8),
    "dense": METHODS["dense"],
    "signs": m.get("distro", k=3, chunk=8, decay=0.9, reduce="owners"),
    "sparse": replace(METHODS["sparseloco, owners"], every=1, delay=0),
    "random": m.get("random-k", k=5, chunk=8, reduce="owners"),
}
"""Each way in which results are merged."""
SMALL = {"one": (3,), "other": (2, 2)}
"""Fewer chunks than replicas."""


def small():
    return {n: torch.arange(2.0, 2.0 + torch.Size(s).numel()).view(s) for n, s in SMALL.items()}


def pull(replica, step, values):
    """Of any parameters, other ones on each replica."""
    return {n: p * (1 + 0.3 * ((replica * 7 + step) % 5)) - replica for n, p in values.items()}


def path(method, start, replicas, steps=STEPS):
    return m.simulate(
        method, start, pull, replicas=replicas, steps=steps, learning_rate=0.05
    )  # fmt: skip


def same(one, other):
    return all(torch.equal(p, other[n]) for n, p in one.items())


def trained(method, start, group, steps=STEPS):
    """What a rank comes to, and what it has sent and received."""
    model = {n: p.clone().requires_grad_() for n, p in start.items()}
    place, size = dist.get_rank(group), dist.get_world_size(group)
    replica = m.Replica(method, model, replica=place, replicas=size)
    rounds, refused = m.Rounds(replica, group), []
    for step in range(steps):
        replica.before_forward(step)
        found = pull(place, step, {n: p.detach() for n, p in model.items()})
        for n, p in model.items():
            p.grad = found[n]
        replica.local(0.05)
        refused.append(rounds.exchange())
    rounds.settle()
    shared = {n: p.clone() for n, p in replica.plain().items()}
    return shared, refused, (rounds.bytes_sent, rounds.bytes_received)


def in_groups(rank):
    """By number of replicas and method; of two, `test_local_steps` has it."""
    found = {}
    for size, start in ((3, detached()), (5, small())):
        group = dist.new_group(list(range(size)))
        for name, method in FORMS.items():
            if rank < size:
                found[size, name] = trained(method, start, group)
    return found


def detached():
    return {n: p.detach() for n, p in parameters().items()}


@pytest.mark.processes
def test_processes_whose_owners_merge_are_simulate_to_the_bit():
    starts = {3: detached(), 5: small()}
    wanted = {(n, name): path(FORMS[name], starts[n], n)[-1] for n in starts for name in FORMS}
    for found in run_ranks(in_groups, 5):
        for (size, name), (shared, refused, sent) in found.items():
            assert same(shared, wanted[size, name]), (size, name)
            assert not any(refused)
            assert min(sent) > 0


@pytest.mark.parametrize("replicas", [17, 20])
@pytest.mark.parametrize(
    "method",
    [
        m.get("distro", k=3, chunk=8, decay=0.9),
        m.get("sparseloco", every=2, k=3, chunk=8, values="parameter"),
        m.get("sparseloco", every=1, k=2, chunk=8, values="parameter", merge="mean"),
        m.get("random-k", k=5, chunk=8),
        m.get("random-k", k=5, chunk=8, values="parameter"),
        m.get("demo", k=3, chunk=8, transform="none", values="sign", outer=m.SGD(rate=0.1)),
    ],
    ids=["signs", "named", "mean", "random signs", "random", "lengths of signs"],
)
def test_more_than_16_replicas_are_merged_by_owners_as_by_an_all_gather(method, replicas):
    gathered, owned = (replace(method, reduce=kind) for kind in ("gather", "owners"))
    assert not are_owned(method, 16)
    start = {n: p for n, p in detached().items() if n in ("layers.0.a", "norm", "scale")}
    wanted = path(gathered, start, replicas, steps=2)
    assert all(map(same, path(owned, start, replicas, steps=2), wanted))
    assert not same(wanted[-1], start)


def test_who_merges():
    """Owners of what is sent whole, and above 16 replicas of what is selected."""
    assert [name for name in m.known() if are_owned(m.get(name), 2)] == [
        "diloco", "streaming-diloco", "muloco", "dense",
    ]  # fmt: skip
    assert all(are_owned(m.get(name), 17) for name in m.known())
    for method, replicas in [
        (m.get("diloco"), 1),
        (m.get("diloco", reduce="gather"), 40),
        (m.get("diloco", values="codebook4"), 3),  # of whole parameters
        (m.get("sparseloco", clip="median"), 40),
    ]:
        assert not are_owned(method, replicas), method
    assert are_owned(m.get("distro", reduce="owners"), 2)


@pytest.mark.parametrize("values", ["sign", "2bit", "bf16", "parameter"])
def test_above_16_replicas_what_is_fewer_bytes(values):
    with torch.device("meta"):
        matrix = torch.empty(64 * 80, 64 * 85)
    chosen = []
    for k in (1, 2, 64, 2000, 4095):
        method = m.get("demo", values=values, k=k)
        layout = cut(method, ["a"], [matrix])
        for replicas in (17, 40):
            gathered, owned = (
                traffic(replace(method, reduce=kind), layout, replicas)
                for kind in ("gather", "owners")
            )
            assert (max(owned) < max(gathered)) == are_owned(method, replicas)
            chosen.append(are_owned(method, replicas))
    assert all(chosen) == (values != "sign")  # of which two replicas' may be one entry


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("replicas", [2, 3, 5, 17])
def test_traffic_is_what_messages_hold(name, replicas):
    method = FORMS[name]
    layout = cut(method, list(SHAPES), [torch.empty(s) for s in SHAPES.values()])
    backends = ["torch"] * len(layout.plans)
    owners = [Owners(method, layout, backends, 0, r, replicas) for r in range(replicas)]
    sizes, merged = owners[0].sizes, owners[0].merged_sizes
    assert sizes_of(method, layout, replicas) == (sizes, merged)
    up = [sum(sizes) - sizes[r] + (replicas - 1) * merged[r] for r in range(replicas)]
    down = [(replicas - 1) * sizes[r] + sum(merged) - merged[r] for r in range(replicas)]
    assert traffic(method, layout, replicas) == (max(up), max(down))
    assert sum(up) == sum(down)


def test_dense_traffic_does_not_grow_with_replicas():
    method = m.get("diloco", values="8bit")
    with torch.device("meta"):
        layout = cut(method, ["a"], [torch.empty(1280, 1280)])
    message = traffic(replace(method, reduce="gather"), layout, 2).up
    for replicas in (2, 3, 8, 16, 50):
        up, down = traffic(method, layout, replicas)
        share = 2 * (replicas - 1) / replicas * message
        assert share * 0.98 <= min(up, down)
        assert (
            max(up, down) <= share * 1.1 + 2 * replicas * 40
        )  # chunks that do not divide; headers
        gathered = traffic(replace(method, reduce="gather"), layout, replicas)
        assert gathered == ((replicas - 1) * message,) * 2


def flipped(wait, calls, which):
    """The `which`-th time, what has come has another byte at the end."""

    def damaged(self):
        came = wait(self).clone()
        calls.append(None)
        if len(calls) == which:
            came.view(-1)[-1] ^= 4
        return came

    return damaged


def damages(rank):
    """One receiver gets a damaged message: all there is, by what is damaged."""
    found, signs = {}, replace(FORMS["signs"], lookahead=False, delay=0)
    for name, method, owner, attribute, which in [
        ("gather", replace(FORMS["sparse"], reduce="gather"), exchange.Pending, "host", 2),
        ("up", FORMS["sparse"], exchanges.Parts, "wait", 5),
        ("down", FORMS["sparse"], exchanges.Parts, "wait", 7),
        (
            "up, signs",
            signs,
            exchanges.Parts,
            "wait",
            5,
        ),
        ("up, all", FORMS["muloco"], exchanges.Parts, "wait", 5),
        ("down, all", FORMS["muloco"], exchanges.Parts, "wait", 7),
    ]:
        wait = getattr(owner, attribute)
        if rank == 1:
            wait = flipped(wait, [], which)
        with mock.patch.object(owner, attribute, wait):
            found[name] = method, trained(method, detached(), dist.group.WORLD)
    return found


@pytest.mark.processes
def test_damage_at_one_receiver_is_refused_by_all_who_go_on_alike():
    everywhere = run_ranks(damages, 3)
    for name, (method, (shared, refused, _)) in everywhere[0].items():
        for found in everywhere[1:]:
            assert same(shared, found[name][1][0]), name
            assert [list(r) for r in refused] == [list(r) for r in found[name][1][1]], name
        # The second message's results; the last bytes are of the last sender, or owner.
        assert [list(r) for r in refused] == [[], [2], []], name
        assert not same(shared, path(method, detached(), 3)[-1]), name
        assert not same(shared, detached()), name


def lie(message, form):
    """Bytes in the middle of the first owner's part of a message, and a checksum that fits."""
    from psyche_fast.distro.message import hash_rows

    part = message[: form.sizes[0]]
    part[40:44] = 255  # a scale that is no number
    words = part.view(torch.int64)
    words[4] = hash_rows(words[None, 5:])[0]


def test_what_only_the_owner_can_see_all_leave_out():
    method = FORMS["diloco"]
    world, alone = World(method, replicas=3), World(method, replicas=3)
    for _ in range(5):
        sent = world.step(lambda messages: lie(messages[2], world.ranks[0].flight()[0]))
        alone.step(leave_out={2})
        assert all(list(one) == [2] and "not finite" in one[2] for one in sent)
    for rank in world.ranks:
        assert same(rank.plain(), alone.ranks[0].plain())


def test_an_owner_that_merges_others_than_agreed_is_refused_and_nothing_is_applied():
    world = World(FORMS["dense"], replicas=3)
    world.step()
    before = {n: p.clone() for n, p in world.ranks[0].plain().items()}
    forms = [rank.flight()[0] for rank in world.ranks]
    merge = forms[1].merge
    with mock.patch.object(forms[1], "merge", lambda turn, parts, out: merge(turn, parts, {0})):
        refused = world.step()
    assert refused == [{}] * 3  # of the first message, which was sent before
    refused = world.step()
    assert all(one == {1: "it has merged replicas [1, 2], wanted [0, 1, 2]"} for one in refused)
    after = world.ranks[0].plain()
    assert not same(before, after)  # by the first
    world.step()
    assert all(same(after, rank.plain()) for rank in world.ranks)


def test_an_owner_that_says_too_much_of_an_index_is_refused():
    """Bytes of signs with any content, and a checksum that fits."""
    from psyche_fast.distro.message import hash_rows

    world = World(m.get("distro", k=3, chunk=8, decay=0.9, reduce="owners"), replicas=2)
    generator = torch.Generator().manual_seed(0)
    refused = 0
    for _ in range(12):
        world.step()
        came = world.pending[-1].messages
        form, turn = world.ranks[0].flight()
        row = form.split(came)[1]
        count = len(row) - 48
        row[48:] = torch.randint(256, (count,), generator=generator, dtype=torch.uint8)
        words = row.view(torch.int64)
        words[4] = hash_rows(words[None, 5:])[0]
        assert form.faults(turn, came) == {}
        for one in world.step():
            refused += len(one)
        a, b = (rank.plain() for rank in world.ranks)
        assert same(a, b)
    assert refused > 0


def waits(rank):
    """Whether a result that has come, by method, is received without the other replica."""
    found = {}
    for name in ("gather", "owners"):
        method = m.get("sparseloco", every=2, delay=1, k=3, chunk=8, reduce=name)
        model = parameters()
        replica = m.Replica(method, model, replica=rank, replicas=2)
        rounds = m.Rounds(replica, dist.group.WORLD)

        def step(number, model=model, replica=replica):
            replica.before_forward(number)
            values = {n: p.detach() for n, p in model.items()}
            for n, g in gradient(rank, number, values).items():
                model[n].grad = g
            replica.local(0.02)

        step(0)
        rounds.send()
        step(1)
        rounds._pending[0].wait()

        nothing = mock.Mock(side_effect=AssertionError)
        with (
            mock.patch.object(exchanges._Gloo, "all_to_all", nothing),
            mock.patch.object(exchange, "start", nothing),
            mock.patch.object(exchanges.Parts, "wait", nothing),
        ):
            assert replica.due()
            assert rounds.receive() == {}
        found[name] = {n: p.clone() for n, p in replica.plain().items()}
    return found


@pytest.mark.processes
def test_what_has_come_is_received_without_anybody_else():
    one, other = run_ranks(waits, 2)
    for name, shared in one.items():
        assert same(shared, other[name])
        assert not same(shared, detached())


def test_parts_are_asked_for_before_any_is_sent():
    """Else what asks for another's part waits behind the own one: a link goes one way only."""
    done = []

    class Group:
        def recv(self, tensors, rank, tag):
            done.append(("recv", rank, tensors[0].numel()))
            tensors[0].fill_(rank)

        def send(self, tensors, rank, tag):
            done.append(("send", rank, tensors[0].tolist()))

    one = object.__new__(exchanges._Gloo)
    one.size, one._own, one._group = 3, 1, Group()
    sent = torch.tensor([7, 8, 8, 9], dtype=torch.uint8)
    parts = one.all_to_all(sent, [1, 2, 1], [3, 2, 0])  # nothing comes from the last
    assert done == [("recv", 0, 3), ("send", 2, [9]), ("send", 0, [7])]
    assert parts._received.tolist() == [0, 0, 0, 8, 8]
