"""Methods in levels: their formulas, what one level and levels of means are, bits, and resuming."""

from __future__ import annotations

import io
from collections import deque
from dataclasses import replace

import numpy as np
import pytest
import torch

from psyche_fast import methods as m
from psyche_fast.methods.exchanges import InProcess
from tests.groups import run_ranks
from tests.methods import levels as tree
from tests.methods import oracle
from tests.methods.test_formulas import INNER, SHAPES, SMALL, THREE, flat, rate, world
from tests.methods.test_replica import METHODS, gradient, parameters
from tests.methods.test_replica import SHAPES as FEW


def several(replica, step, values):
    """Gradients of more replicas than `world` has."""
    return world()[1](replica % 3, (step + 7 * replica) % 64, values)


def simulated(levels, steps, of=several, start=None):
    start = world()[0] if start is None else start

    def of_tensors(replica, step, values):
        found = of(replica, step, {n: p.numpy() for n, p in values.items()})
        return {n: torch.tensor(g) for n, g in found.items()}

    tensors = {n: torch.tensor(p, dtype=torch.float64) for n, p in start.items()}
    replicas = int(np.prod([count for count, _ in levels]))
    return m.simulate(
        levels, tensors, of_tensors, replicas=replicas, steps=steps, learning_rate=rate
    )


def close(got, wanted, least=1e-12):
    for step, (mine, theirs) in enumerate(zip(got, wanted, strict=True)):
        for n, p in mine.items():
            worst = np.abs(p.numpy().reshape(-1) - np.asarray(theirs[n]).reshape(-1)).max()
            assert worst < least, (step, n, worst)


DENSE = m.get("dense", values="parameter", chunk=8, outer=INNER)
SPARSE = m.get("sparseloco", every=4, values="parameter", decay=0.9, inner=INNER,
               outer=m.SGD(rate=0.7), **SMALL)  # fmt: skip
DISTRO = m.get("distro", values="parameter", decay=0.95, **SMALL)
DILOCO = m.get("diloco", every=2, values="parameter", chunk=8, inner=INNER,
               outer=m.Nesterov(rate=0.5, momentum=0.8))  # fmt: skip
STREAM = m.get("streaming-diloco", every=6, fragments=3, delay=1, values="parameter", inner=INNER,
               outer=m.Nesterov(rate=0.5, momentum=0.8))  # fmt: skip

_SPARSE = {"every": 4, "how": "topk", "feedback": True, "merge": "named", "beta": 0.9, "eta_o": 0.7}
_DISTRO = {"beta": 0.95, "delay": 1, "ahead": True}
_DILOCO = {"every": 2, "eta_o": 0.5, "mu": 0.8}
_STREAM = {"every": 6, "fragments": THREE, "delay": 1, "eta_o": 0.5, "mu": 0.8}
_INNER = {"inner": oracle.AdamW}

# What is below is named first; the numbers are odd where that costs little.
CASES = {
    "means below local steps": (
        [(2, DENSE), (3, SPARSE)],
        [(2, tree.Means, {}), (3, tree.Local, {**_SPARSE, **_INNER})],
    ),
    "means below means below momentum below local steps": (
        [(2, DENSE), (1, DENSE), (2, DISTRO), (2, SPARSE)],
        [(2, tree.Means, {}), (1, tree.Means, {}), (2, tree.Momentum, _DISTRO),
         (2, tree.Local, _SPARSE)],
    ),
    "momentum below parts that take turns, late": (
        [(2, DISTRO), (2, replace(STREAM, mix="rebase"))],
        [(2, tree.Momentum, _DISTRO), (2, tree.Local, {**_STREAM, "mix": "rebase"})],
    ),
    "local steps below local steps": (
        [(3, DILOCO), (2, SPARSE)],
        [(3, tree.Local, {**_DILOCO, **_INNER}), (2, tree.Local, _SPARSE)],
    ),
    "local steps that keep their own, below": (
        [(2, replace(STREAM, mix=0.5)), (2, SPARSE), (2, replace(DILOCO, every=4))],
        [(2, tree.Local, {**_STREAM, **_INNER, "mix": 0.5}), (2, tree.Local, _SPARSE),
         (2, tree.Local, {**_DILOCO, "every": 4})],
    ),
    "results that land in the next round of the level below": (
        [(2, DILOCO), (2, replace(SPARSE, delay=3, mix="rebase"))],
        [(2, tree.Local, {**_DILOCO, **_INNER}),
         (2, tree.Local, {**_SPARSE, "delay": 3, "mix": "rebase"})],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_levels_follow_their_formulas(name):
    levels, nodes = CASES[name]
    wide, wrapped = flat(several, world()[0])
    wanted = tree.path(wide, wrapped, rate, levels=nodes, steps=13)
    got = simulated(levels, 13)
    close(got, wanted)
    assert any(not torch.equal(got[-1][n], got[0][n]) for n in SHAPES)


@pytest.mark.parametrize("name", METHODS)
def test_one_level_is_the_method(name):
    start = {n: p.detach() for n, p in parameters().items()}
    run = {"steps": 7, "learning_rate": rate, "replicas": 2}
    for one, other in zip(
        m.simulate(METHODS[name], start, gradient, **run),
        m.simulate([(2, METHODS[name])], start, gradient, **run),
        strict=True,
    ):
        assert all(torch.equal(one[n], other[n]) for n in start)


@pytest.mark.parametrize("method", [SPARSE, DISTRO, DENSE], ids=["local", "momentum", "gradient"])
def test_means_below_a_method_are_the_method_on_mean_gradients(method):
    def mean(replica, step, values):
        found = [several(2 * replica + r, step, values) for r in range(2)]
        return {n: (found[0][n] + found[1][n]) / 2 for n in SHAPES}

    close(simulated([(2, DENSE), (2, method)], 9), simulated([(2, method)], 9, mean))


def test_replicas_agree_on_what_each_level_shares():
    """Racks of a site on DisTrO's parameters, all on the anchor, sites on both at a round's end."""
    levels = [(2, DENSE), (2, m.get("distro", decay=0.9, **SMALL)),
              (2, m.get("sparseloco", every=3, **SMALL))]  # fmt: skip
    world = World(levels)
    for step in range(8):
        world.step()
        for at, block in ((1, 4), (2, 8)):
            for number, rank in enumerate(world.ranks):
                first = world.ranks[number - number % block].levels[at].plain()
                assert all(torch.equal(p, first[n]) for n, p in rank.levels[at].plain().items())
        own = [rank.levels[1].plain()["norm"] for rank in world.ranks]
        assert torch.equal(own[0], own[4]) == (step in (0, 2, 5)), (
            "DisTrO's first result comes late"
        )


class World:
    """Ranks of a hierarchy in one process, and what is under way at each level."""

    def __init__(self, levels, seed=0):
        self.levels = levels
        self.ranks, self.models = [], []
        for rank in range(int(np.prod([count for count, _ in levels]))):
            self.models.append(parameters(seed))
            self.ranks.append(m.Hierarchy(levels, self.models[-1], rank=rank))
        self.pending = [deque() for _ in levels]

    def peers(self, at, rank):
        site = int(np.prod([count for count, _ in self.levels[:at]]))
        first = rank - rank // site % self.levels[at][0] * site
        return tuple(first + site * number for number in range(self.levels[at][0]))

    def step(self):
        step = self.ranks[0].step
        for r, (rank, model) in enumerate(zip(self.ranks, self.models, strict=True)):
            rank.before_forward(step)
            found = gradient(r % 3, step, {n: p.detach() for n, p in model.items()})
            for n, p in model.items():
                p.grad = found[n] * (1 + r)
            rank.local(0.02 / (1 + step))
        for at in range(len(self.levels)):
            sent = [rank.send(at) for rank in self.ranks]
            if sent[0] is not None:
                self.pending[at].append(sent)
            while self.ranks[0].due(at):
                sent = self.pending[at].popleft()
                for group in sorted({self.peers(at, r) for r in range(len(self.ranks))}):
                    peers = InProcess([self.ranks[r].levels[at] for r in group])
                    arrived = peers.deliver([sent[r] for r in group], at=0)
                    for r in group:
                        assert self.ranks[r].receive(at, arrived.messages, arrived.leave_out) == {}

    def saved(self):
        written = io.BytesIO()
        torch.save([rank.state_dict() for rank in self.ranks], written)
        return io.BytesIO(written.getvalue())

    def load(self, saved):
        for rank, state in zip(self.ranks, torch.load(saved, weights_only=True), strict=True):
            rank.load_state_dict(state)
        for at in range(len(self.levels)):
            flights = [rank.levels[at].in_flight() for rank in self.ranks]
            self.pending[at] = deque(list(sent) for sent in zip(*flights, strict=True))


LATE = m.get("sparseloco", every=3, delay=1, mix="rebase", **SMALL)


@pytest.mark.parametrize(
    "levels",
    [
        [(2, DENSE), (2, m.get("distro", decay=0.9, **SMALL)), (2, LATE)],
        [(2, replace(STREAM, fragments=2, mix=0.5, values="4bit")), (2, replace(LATE, every=6))],
    ],
    ids=["three", "local"],
)
def test_resumed_at_any_step_is_as_never_interrupted(levels):
    whole, saved = World(levels), []
    for _ in range(8):
        saved.append(whole.saved())
        whole.step()
    for step in (1, 2, 3, 5):  # in a round, with a message in flight, at rounds' ends
        resumed = World(levels, seed=1)
        resumed.load(saved[step])
        for _ in range(step, 8):
            resumed.step()
        for one, other in zip(whole.models, resumed.models, strict=True):
            assert all(torch.equal(one[n], other[n]) for n in FEW), step
        for one, other in zip(whole.ranks, resumed.ranks, strict=True):
            assert all(torch.equal(p, other.plain()[n]) for n, p in one.plain().items())
    with pytest.raises(ValueError, match="saved levels: wanted 1, got"):
        m.Hierarchy([(8, LATE)], parameters(), rank=0).load_state_dict(whole.ranks[0].state_dict())


def test_what_is_shared_can_be_looked_at_between_steps():
    """Two levels of local steps over DisTrO: the model has the anchor, and goes on as if never."""
    levels = [(1, m.get("distro", decay=0.9, **SMALL)), (2, LATE), (2, replace(LATE, every=6))]
    world, alone = World(levels), World(levels)
    for step in range(8):
        for w in (world, alone):
            w.step()
        if step in (1, 2, 4, 6):
            saved = world.saved() if step == 4 else None
            for rank, model in zip(world.ranks, world.models, strict=True):
                rank.put_shared()
                assert all(torch.equal(p, rank.plain()[n]) for n, p in model.items())
            if saved is not None:  # as if it had not been looked at
                assert world.saved().getvalue() == saved.getvalue()
    for one, other in zip(world.models, alone.models, strict=True):
        assert all(torch.equal(one[n], other[n]) for n in FEW)


def test_a_gradient_that_is_not_finite_is_left_out_where_it_is():
    """The mean is over all of a rack, as between replicas of `dense`."""
    levels = [(2, replace(DENSE, reduce="gather")), (2, SPARSE)]
    world, alone = World(levels), World(levels)
    for w, value in ((world, float("nan")), (alone, 0.0)):
        for r, (rank, model) in enumerate(zip(w.ranks, w.models, strict=True)):
            rank.before_forward(0)
            for p in model.values():
                p.grad = torch.full_like(p, value if r == 1 else 0.5)
            rank.local(0.1)
        sent = [rank.send(0) for rank in w.ranks]
        for r, rank in enumerate(w.ranks):
            rank.receive(0, torch.stack(sent[r - r % 2 :][:2]))
            rank.send(1)
    for n in FEW:
        assert torch.equal(world.models[0][n], alone.models[0][n])
        assert bool(world.models[0][n].isfinite().all())
        assert not torch.equal(world.models[0][n], parameters()[n])


def test_where_every_mean_is_refused_no_step_is_made():
    world = World([(2, replace(DENSE, reduce="gather")), (2, SPARSE)])
    rank, model = world.ranks[0], world.models[0]
    rank.before_forward(0)
    for p in model.values():
        p.grad = torch.ones_like(p)
    rank.local(0.1)
    message = rank.send(0)
    assert len(rank.receive(0, torch.zeros(2, len(message), dtype=torch.uint8))) == 2
    rank.send(1)
    assert all(torch.equal(p, parameters()[n]) for n, p in model.items())
    assert rank.step == 1


@pytest.mark.parametrize(
    ("levels", "reason"),
    [
        ([], "levels: wanted pairs of a number and a method, got"),
        ("dense", "levels: wanted pairs of a number and a method, got 'dense'"),
        ([(2, DENSE), 2], "level 2: wanted a number and a method, got 2"),
        ([(0, DENSE)], "level 1: wanted a number of at least 1, got 0"),
        ([(True, DENSE)], "level 1: wanted a number of at least 1, got True"),
        ([(2, "dense")], "level 1: wanted a Method, got 'dense'"),
        ([(2, DISTRO), (2, DENSE)], "level 2 over level 1: what='gradient' takes gradients"),
        ([(2, SPARSE), (2, DISTRO)], "what='momentum' takes gradients, which only levels of"),
        ([(2, DISTRO), (2, DISTRO)], "below is what='momentum'"),
        ([(2, DILOCO), (2, replace(SPARSE, every=3))],
         "level 2 over level 1: rounds of 3 steps are no multiple of those of 2 below"),
        ([(2, DENSE), (2, SPARSE), (2, STREAM)], "level 3 over level 2: rounds of 2 steps"),
        ([(2, replace(DENSE, delay=1)), (2, SPARSE)], "delay=0 below, got 1"),
        ([(2, replace(DENSE, outer=m.AdamW(eps=1e-3))), (2, SPARSE)],
         "the step is the upper level's, by AdamW"),
    ],
)  # fmt: skip
def test_levels_that_do_not_go_together(levels, reason):
    with pytest.raises((TypeError, ValueError), match=reason):
        m.Hierarchy(levels, parameters(), rank=0)


def test_numbers_that_do_not_fit():
    with pytest.raises(ValueError, match="replicas=3 is not the product of the levels' 2 x 2"):
        m.simulate([(2, DENSE), (2, SPARSE)], parameters(), gradient, replicas=3, steps=1,
                   learning_rate=0.1)  # fmt: skip
    with pytest.raises(ValueError, match="rank must be from 0 to 3, got 4"):
        m.Hierarchy([(2, DENSE), (2, SPARSE)], parameters(), rank=4)
    with pytest.raises(ValueError, match="a mean gradient wants float32"):
        m.Hierarchy([(2, DENSE), (2, DISTRO)], parameters(dtype=torch.bfloat16), rank=0)


NESTED = {
    "means below local steps": [(2, DENSE), (2, replace(LATE, values="2bit"))],
    # Owners merge at both levels, and the upper one keeps what their coding leaves out.
    "local steps below local steps": [
        (2, m.get("diloco", every=2, chunk=8)),
        (2, m.get("muloco", every=4, chunk=8, values="4bit")),
    ],
}


def nested(rank, name):
    """A rank's parameters after each of some steps, and what it has sent and been sent."""
    model, path = parameters(), []
    hierarchy = m.Hierarchy(NESTED[name], model, rank=rank)
    rounds = m.rounds_of(hierarchy, torch.distributed.group.WORLD)
    for step in range(8):
        if step == 5:  # in a round, with what is in flight
            for one in rounds:
                one.settle()
            state, model = hierarchy.state_dict(), parameters(1)
            hierarchy = m.Hierarchy(NESTED[name], model, rank=rank)
            rounds = m.rounds_of(hierarchy, torch.distributed.group.WORLD)
            hierarchy.load_state_dict(state)
            for one in rounds:
                one.resume()
        hierarchy.before_forward(step)
        found = gradient(rank % 3, step, {n: p.detach() for n, p in model.items()})
        for n, p in model.items():
            p.grad = found[n]
        hierarchy.local(rate(step))
        for one in rounds:
            one.send()
            assert one.receive() == {}
        path.append({n: p.clone() for n, p in hierarchy.plain().items()})
    return path, [(one.bytes_sent, one.bytes_received) for one in rounds]


@pytest.mark.processes
@pytest.mark.parametrize("name", NESTED)
def test_two_sites_of_two_processes_are_the_simulation_to_the_bit(name):
    start = {n: p.detach() for n, p in parameters().items()}
    wanted = m.simulate(
        NESTED[name], start, lambda r, t, p: gradient(r % 3, t, p), replicas=4, steps=8,
        learning_rate=rate,
    )  # fmt: skip
    found = run_ranks(nested, 4, name)
    for path, _ in found:
        for one, other in zip(path, wanted, strict=True):
            assert all(torch.equal(one[n], other[n]) for n in FEW)
    inside, between = zip(*(sent for _, sent in found), strict=True)
    assert all(up > 0 and down > 0 for up, down in inside)
    assert [up > 0 for up, _ in between] == [True, False, True, False], "the first of each site"
