"""Two processes over gloo are what `simulate` makes of two replicas, to the bit."""

from __future__ import annotations

import io

import pytest
import torch
import torch.distributed as dist

import psyche_fast
from psyche_fast import methods as m
from tests.groups import run_ranks
from tests.methods.test_replica import METHODS, gradient, parameters

STEPS = 8
LOCAL = {name: method for name, method in METHODS.items() if method.is_local}


def factor(step):
    return 1 / (1 + step)


def rate(step):
    return 0.02 * factor(step)


def set_gradients(rank, step, model):
    found = gradient(rank, step, {n: p.detach() for n, p in model.items()})
    for n, p in model.items():
        p.grad = found[n]


class Loop:
    """A model, an optimiser of torch's inside of `LocalSteps`, and a scheduler of torch's."""

    def __init__(self, method, **options):
        self.model, inner = parameters(), method.inner
        if isinstance(inner, m.Muon):
            optimizer = m.MuonAdamW(self.model.items(), lr=0.02, options=inner)
        else:
            optimizer = torch.optim.AdamW(
                self.model.items(), lr=0.02, betas=inner.betas, eps=inner.eps,
                weight_decay=inner.weight_decay,
            )  # fmt: skip
        self.optimizer = psyche_fast.LocalSteps(optimizer, method, **options)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)

    def step(self, rank, step):
        set_gradients(rank, step, self.model)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        return {n: p.clone() for n, p in self.optimizer.shared.items()}


def local_steps(rank):
    """Paths by method: without a break, and each begun anew in the middle."""
    found = {}
    for name, method in LOCAL.items():
        loop = Loop(method)
        whole = [loop.step(rank, step) for step in range(STEPS)]
        loop, broken = Loop(method), []
        for step in range(STEPS):
            if step in (2, 5):
                written = io.BytesIO()
                torch.save((loop.optimizer.state_dict(), loop.schedule.state_dict()), written)
                written.seek(0)
                states = torch.load(written, weights_only=True)
                loop = Loop(method)
                loop.schedule.load_state_dict(states[1])
                loop.optimizer.load_state_dict(states[0])
            broken.append(loop.step(rank, step))
        found[name] = whole, broken, loop.optimizer.bytes_sent
    return found


def every_method(rank):
    found = {}
    for name, method in METHODS.items():
        model = parameters()
        replica = m.Replica(method, model, replica=rank, replicas=2)
        rounds = m.Rounds(replica, dist.group.WORLD)
        for step in range(STEPS):
            replica.before_forward(step)
            set_gradients(rank, step, model)
            replica.local(rate(step))
            assert rounds.exchange() == {}
        found[name] = {n: p.clone() for n, p in replica.plain().items()}
    return found


def other(rank):
    return torch.optim.SGD([torch.full((3,), float(rank), requires_grad=True)])


def refusals(rank):
    """Replicas that do not begin with the same."""
    method, said = LOCAL["sparseloco"], []
    for make in (
        lambda: Loop(method, k=4 + rank),
        lambda: psyche_fast.LocalSteps(other(rank)),
    ):
        with pytest.raises(ValueError, match="of replica 1 and of replica 0 differ") as caught:
            make()
        said.append(str(caught.value))
    return said


def paths(method):
    return m.simulate(
        method, parameters(), gradient, replicas=2, steps=STEPS, learning_rate=rate
    )  # fmt: skip


def same(one, other):
    return all(torch.equal(p, other[n]) for n, p in one.items())


@pytest.mark.processes
def test_local_steps_around_an_optimiser_of_torchs_are_those_of_simulate():
    for ranks in run_ranks(local_steps, 2):
        for name, (whole, broken, sent) in ranks.items():
            wanted = paths(LOCAL[name])
            assert all(map(same, whole, wanted)), name
            assert all(map(same, broken, wanted)), name
            assert sent > 0


@pytest.mark.processes
def test_every_method_over_gloo_is_that_of_simulate():
    for found in run_ranks(every_method, 2):
        for name, got in found.items():
            assert same(got, paths(METHODS[name])[-1]), name


@pytest.mark.processes
def test_replicas_begin_with_the_same():
    said, also = run_ranks(refusals, 2)
    assert said == also
    assert said[0].startswith("the method of")
    assert said[1].startswith("the parameters of")


def test_alone_it_is_one_replica():
    method = LOCAL["streaming"]
    loop = Loop(method)
    mine = [loop.step(0, step) for step in range(STEPS)]
    wanted = m.simulate(method, parameters(), gradient, replicas=1, steps=STEPS, learning_rate=rate)
    assert all(map(same, mine, wanted))
    assert loop.optimizer.bytes_sent == 0


def test_what_a_loop_does_with_an_optimiser():
    loop = Loop(LOCAL["sparseloco"], every=2, delay=0)
    optimizer, p = loop.optimizer, loop.model["norm"]
    assert optimizer.method.every == 2
    assert optimizer.param_groups is optimizer.inner.param_groups
    assert optimizer.step(lambda: 3.5) == 3.5  # no gradients yet
    set_gradients(0, 0, loop.model)
    optimizer.zero_grad()
    assert p.grad is None
    with pytest.raises(ValueError, match="cannot be added to LocalSteps"):
        optimizer.add_param_group({"params": [torch.zeros(2)]})
    with pytest.raises(ValueError, match="which what='momentum' has not"):
        psyche_fast.LocalSteps(optimizer.inner, "distro")
    with pytest.raises(TypeError, match="wanted a torch"):
        psyche_fast.LocalSteps(loop.model.values())
    with pytest.raises(ValueError, match="has local_steps, got"):
        optimizer.load_state_dict(optimizer.inner.state_dict())


def test_a_step_that_overflows_under_a_scaler_counts_and_changes_nothing():
    loop, plain = (
        Loop(LOCAL["sparseloco"], every=3, delay=0),
        Loop(LOCAL["sparseloco"], every=3, delay=0),
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=100)
    for step in range(3):
        for one, scale in ((loop, scaler.get_scale()), (plain, 1.0)):
            set_gradients(0, step, one.model)
            for p in one.model.values():
                p.grad *= float("inf") if step == 1 and scale != 1.0 else scale
                if step == 1 and scale == 1.0:
                    p.grad = None
        scaler.scale(torch.ones(()))
        scaler.step(loop.optimizer)
        scaler.update()
        plain.optimizer.step()
    assert loop.optimizer.replica.step == 3
    assert same(loop.optimizer.shared, plain.optimizer.shared)
    assert not same(loop.optimizer.shared, parameters())
