"""A replica in a loop: DisTrO's bits, messages that are refused, and resuming at any step."""

from __future__ import annotations

import io
from collections import deque
from dataclasses import replace

import pytest
import torch

import psyche_fast
from psyche_fast import methods as m
from psyche_fast.methods import muon
from psyche_fast.methods.exchanges import InProcess

SHAPES = {"layers.0.a": (8, 12), "layers.1.a": (7, 11), "layers.2.b": (2, 4, 6), "norm": (13,),
          "scale": ()}  # fmt: skip

METHODS = {
    "distro": m.get("distro", k=3, chunk=8, decay=0.9),
    "distro, part": m.get("distro", k=3, chunk=8, decay=0.9, subtract=0.5, values="8bit"),
    "demo-v2": m.get("demo-v2", k=3, chunk=8, delay=2),
    "sparseloco": m.get("sparseloco", every=3, k=3, chunk=8, delay=1, mix="rebase"),
    "streaming": m.get("streaming-diloco", every=6, fragments=2, delay=2, chunk=8),
    "muloco": m.get("muloco", every=3, chunk=8),
    "random-k": m.get("random-k", k=5, chunk=8),
    "dense": m.get("dense", chunk=8, delay=1),
    "distro, owners": m.get("distro", k=3, chunk=8, decay=0.9, reduce="owners"),
    "sparseloco, owners": m.get(
        "sparseloco", every=2, k=3, chunk=8, delay=1, values="4bit", reduce="owners"
    ),
}


def parameters(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {
        n: torch.randn(s, generator=generator).to(dtype).requires_grad_() for n, s in SHAPES.items()
    }


GOALS = [parameters(10 + r) for r in range(3)]


def gradient(replica, step, values):
    return {n: (p - GOALS[replica][n].detach()) * (1 + 0.1 * step) for n, p in values.items()}


class World:
    """Replicas in one process, and their messages under way."""

    def __init__(self, method, replicas=2, seed=0, dtype=torch.float32):
        self.models = [parameters(seed, dtype) for _ in range(replicas)]
        self.ranks = [
            m.Replica(method, model, replica=r, replicas=replicas)
            for r, model in enumerate(self.models)
        ]
        self.exchange, self.pending = InProcess(self.ranks), deque()

    def set_gradients(self, model, replica, step):
        found = gradient(replica, step, {n: p.detach() for n, p in model.items()})
        for n, p in model.items():
            p.grad = found[n].to(p.dtype)

    def step(self, damage=None, leave_out=()):
        refused, sent = [], []
        for r, (rank, model) in enumerate(zip(self.ranks, self.models, strict=True)):
            step = rank.step
            rank.before_forward(step)
            self.set_gradients(model, r, step)
            rank.local(0.02 / (1 + step))
            sent.append(rank.send())
        if sent[0] is not None:
            messages = torch.stack(sent)
            if damage is not None:
                damage(messages)
            self.pending.append(self.exchange.deliver(messages, leave_out=leave_out))
        while self.ranks[0].due():
            came = self.pending.popleft()
            found = [rank.receive(came.messages, came.leave_out) for rank in self.ranks]
            refused += [one | came.refused for one in found]
        return refused

    def saved(self):
        """As it is on a disk."""
        written = io.BytesIO()
        torch.save([rank.state_dict() for rank in self.ranks], written)
        return io.BytesIO(written.getvalue())

    def load(self, saved):
        states = torch.load(saved, weights_only=True)
        for rank, state in zip(self.ranks, states, strict=True):
            rank.load_state_dict(state)
        flights = zip(*(rank.in_flight() for rank in self.ranks), strict=True)
        self.pending = deque(
            self.exchange.deliver(messages, at) for at, messages in enumerate(flights)
        )

    def everything(self):
        """All that replicas have, shared or not."""
        for rank, model in zip(self.ranks, self.models, strict=True):
            yield from rank.plain().values()
            if rank.method.is_local:
                yield from (p.detach() for p in model.values())


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.everything(), other.everything(), strict=True))


@pytest.mark.parametrize("values", ["sign", "parameter"])
def test_distro_is_the_optimisers_to_the_bit(values):
    world = World(m.get("distro", k=3, chunk=8, decay=0.9, values=values,
                        outer=m.Sign(weight_decay=0.1)))  # fmt: skip
    models = [parameters() for _ in range(2)]
    peers = [
        psyche_fast.Distro(
            model, compression_decay=0.9, compression_topk=3, compression_chunk=8, weight_decay=0.1
        )
        for model in models
    ]
    own, previous = [None, None], None
    for step in range(12):
        lr, before = 0.02 / (1 + step), 0.02 / max(step, 1)
        for r, (peer, model) in enumerate(zip(peers, models, strict=True)):
            peer.error_correction(before)
            found = gradient(r, step, {n: p.detach() for n, p in model.items()})
            for n, p in model.items():
                p.grad = found[n]
            own[r] = peer.generate(own[r], before, lr)
        if previous is not None:
            for peer in peers:
                peer.apply(previous, lr)
        quantise = psyche_fast.quantize_1bit if values == "sign" else list
        previous = [quantise(results) for results in own]
        world.step()
        for n, p in world.ranks[1].plain().items():
            assert torch.equal(p, models[1][n].detach()), (step, n)


@pytest.mark.parametrize("name", METHODS)
def test_resumed_at_any_step_is_as_never_interrupted(name):
    whole, saved = World(METHODS[name]), []
    for _ in range(9):
        saved.append(whole.saved())
        whole.step()
    for step, state in enumerate(saved):
        resumed = World(METHODS[name], seed=1)
        resumed.load(state)
        for _ in range(step, 9):
            resumed.step()
        assert same(whole, resumed), step
    assert not same(whole, World(METHODS[name]))


def test_a_state_of_something_else_is_refused():
    world = World(METHODS["sparseloco"])
    state = world.ranks[0].state_dict()
    for other, reason in [
        (World(METHODS["muloco"]).ranks[0], "saved method: wanted Method"),
        (World(METHODS["sparseloco"], 3).ranks[0], "saved replicas: wanted 3, got 2"),
        (world.ranks[1], "saved replica: wanted 1, got 0"),
    ]:
        with pytest.raises(ValueError, match=reason):
            other.load_state_dict(state)
    del state["shared"]["norm"]
    with pytest.raises(ValueError, match="parameter norm is in the saved state or the model alone"):
        world.ranks[0].load_state_dict(state)


@pytest.mark.parametrize("name", METHODS)
def test_a_damaged_message_is_refused_by_all_and_the_mean_is_over_the_others(name):
    """What is left is what a world without that replica's message makes of it."""
    method = METHODS[name]
    world, alone = World(method), World(method)

    def flip(messages):
        messages[1, -1] ^= 64

    refused = []
    for _ in range(8):
        refused += world.step(flip)
        alone.step(leave_out={1})
        a, b = (rank.plain() for rank in world.ranks)
        assert all(torch.equal(a[n], b[n]) for n in a)
        assert all(torch.equal(a[n], alone.ranks[0].plain()[n]) for n in a)
    assert len(refused) >= 4
    assert all(list(one) == [1] and "checksum" in one[1] for one in refused)


def test_headers_say_what_does_not_fit():
    world, sent = World(replace(METHODS["streaming"], reduce="gather")), []
    for rank in world.ranks:
        rank.before_forward(0)
        rank.local(0.1)
        sent.append(rank.send())
    good = torch.stack(sent)
    rank = world.ranks[0]
    for at, reason in [(0, "magic"), (4, "version"), (6, "fragment"), (8, "size"), (16, "hash"),
                       (24, "round"), (28, "sender"), (40, "checksum")]:  # fmt: skip
        bad = good.clone()
        bad[1, at] ^= 1
        assert list(rank.faults(bad)) == [1]
        assert reason in rank.faults(bad)[1]
    assert rank.faults(good) == {}
    with pytest.raises(ValueError, match=r"messages: wanted uint8 \[replicas, "):
        rank.faults(good[:, :-8])


@pytest.mark.parametrize("name", ["sparseloco", "demo-v2", "muloco", "dense", "distro, part"])
def test_bytes_of_anybody_are_taken_or_refused(name):
    """With a good header and checksum, and anything after them."""
    from psyche_fast.distro.message import hash_rows

    world = World(METHODS[name])
    generator = torch.Generator().manual_seed(0)
    refused = 0

    def scramble(messages):
        form, _ = world.ranks[0].flight()
        for row in messages[1].split(getattr(form, "sizes", form.size)):
            if len(row) > 40:
                count = int(torch.randint(1, 40, (), generator=generator))
                places = torch.randint(40, len(row), (count,), generator=generator)
                row[places] = torch.randint(256, (count,), generator=generator, dtype=torch.uint8)
                words = row.view(torch.int64)
                words[4] = hash_rows(words[None, 5:])[0]

    for _ in range(30):
        for one in world.step(scramble):
            assert set(one) <= {1}
            refused += len(one)
        a, b = (rank.plain() for rank in world.ranks)
        assert all(torch.equal(a[n], b[n]) and bool(a[n].isfinite().all()) for n in a)
    if name in ("sparseloco", "demo-v2"):
        assert refused > 0


def test_a_round_of_which_nothing_is_left_changes_nothing_that_is_shared():
    world = World(METHODS["sparseloco"])
    before = {n: p.clone() for n, p in world.ranks[0].plain().items()}
    for _ in range(3):
        world.step(lambda messages: messages.zero_())
    assert all(torch.equal(p, before[n]) for n, p in world.ranks[0].plain().items())


def test_narrow_parameters_are_rounded_from_a_float32_copy():
    method = m.get("demo", k=3, chunk=8, values="bf16")
    world = World(method, dtype=torch.bfloat16)
    for _ in range(5):
        world.step()
    for n, p in world.ranks[0].plain().items():
        assert p.dtype == torch.float32
        assert torch.equal(world.models[0][n].detach(), p.bfloat16())
    assert any(not torch.equal(p, p.bfloat16().float()) for p in world.ranks[0].plain().values())


def test_steps_come_in_order_and_results_when_they_are_due():
    rank = World(METHODS["sparseloco"]).ranks[0]
    with pytest.raises(ValueError, match="this replica's next one is 0, got 1"):
        rank.before_forward(1)
    with pytest.raises(ValueError, match="nothing is due after 0 steps"):
        rank.receive(torch.zeros(2, 8, dtype=torch.uint8))


def test_simulate_refuses_gradients_that_do_not_fit():
    method, start = METHODS["demo-v2"], parameters()
    run = {"replicas": 1, "steps": 1, "learning_rate": 0.1}
    with pytest.raises(ValueError, match="gradient of replica 0 has no such parameter: q"):
        m.simulate(method, start, lambda r, t, p: {"q": p["norm"]}, **run)
    with pytest.raises(ValueError, match=r"for norm: wanted \[13\], got \[12\]"):
        m.simulate(method, start, lambda r, t, p: {"norm": p["norm"][1:]}, **run)


@pytest.mark.parametrize("name", m.known())
def test_parameters_that_are_empty_or_single_numbers(name):
    method = m.get(name)
    if method.is_local:
        method = m.get(name, every=2, fragments=1, delay=0)
    start = {"empty": torch.zeros(3, 0, 5), "none": torch.zeros(0), "one": torch.zeros(1),
             "scalar": torch.zeros(()), "four": torch.zeros(2, 3, 2, 5)}  # fmt: skip
    path = m.simulate(
        method, start, lambda r, t, p: {n: p[n] - 1 for n in p}, replicas=2, steps=4,
        learning_rate=0.1,
    )  # fmt: skip
    assert {n: p.shape for n, p in path[-1].items()} == {n: p.shape for n, p in start.items()}
    assert all(bool((path[-1][n] > 0).all()) for n in ("one", "scalar"))
    assert float(path[-1]["four"].mean()) > 0


def test_muon_is_as_exact_where_products_of_bfloat16_would_be_emulated(monkeypatch):
    generator = torch.Generator().manual_seed(3)
    matrices = [torch.randn(s, generator=generator) for s in [(48, 96), (96, 32)] * 2]
    exact = muon.orthogonalise(m.Muon(), [x.double() for x in matrices])
    errors = {}
    for fast in (True, False):
        monkeypatch.setattr(muon, "multiplies_bf16", lambda kind, fast=fast: fast)
        found = muon.orthogonalise(m.Muon(), matrices)
        assert all(x.dtype == torch.bfloat16 for x in found)
        errors[fast] = [float((x - e).norm()) for x, e in zip(found, exact, strict=True)]
    assert all(new <= 1.1 * old for new, old in zip(errors[False], errors[True], strict=True))


def test_muon_is_torchs():
    start, ours = parameters(), parameters()
    matrices = ["layers.0.a", "layers.1.a"]
    theirs = torch.optim.Muon([start[n] for n in matrices], lr=0.02)
    mine = m.MuonAdamW([(n, ours[n]) for n in matrices], lr=0.02)
    for step in range(5):
        for n in matrices:
            start[n].grad = gradient(0, step, {n: start[n].detach()})[n]
            ours[n].grad = start[n].grad.clone()
        theirs.step()
        mine.step()
    for n in matrices:  # bfloat16 inside
        assert (start[n] - ours[n]).abs().max() < 2e-3
        assert (start[n] - parameters()[n]).abs().max() > 2e-2
