"""Methods by kernels: nothing of a step is left to plain PyTorch where there is a kernel."""

from __future__ import annotations

import pytest
import torch

from psyche_fast import methods as m
from psyche_fast.kernels import backends
from psyche_fast.methods.exchanges import InProcess

pytest.importorskip("triton")

SHAPES = {"layers.0.a": (16, 32), "layers.1.a": (3, 6), "norm": (20,)}
LOCAL = {"every": 1, "chunk": 16}
METHODS = {
    "distro": m.get("distro", k=3, chunk=16),
    "demo, sgd": m.get("demo", k=3, chunk=16, outer=m.SGD(rate=0.5), subtract=0.5),
    "demo, nesterov": m.get("demo", k=3, chunk=16, outer=m.Nesterov(rate=0.5), merge="mean"),
    "sparseloco": m.get("sparseloco", k=6, **LOCAL),
    "sparseloco, dct": m.get("sparseloco", k=6, transform="dct", values="8bit", **LOCAL),
    "diloco": m.get("diloco", **LOCAL),
    "diloco, gathered": m.get("diloco", reduce="gather", **LOCAL),
    "diloco, 8bit": m.get(
        "diloco", reduce="gather", values="8bit", feedback="sent", decay=0.9, **LOCAL
    ),
    "streaming": m.get("streaming-diloco", fragments=1, every=2, delay=1, chunk=16),
    "rebase": m.get("diloco", values="2bit", delay=1, mix="rebase", every=2, chunk=16),
    "muloco": m.get("muloco", **LOCAL),
    "random-k": m.get("random-k", k=5, chunk=16),
    "dense": m.get("dense", chunk=16),
}


def path(method, backend):
    """The shared parameters of two replicas when a round has been applied, by the backend."""
    steps = max(method.every + method.delay, 2)
    generator = torch.Generator().manual_seed(0)
    start = {n: torch.randn(s, generator=generator) for n, s in SHAPES.items()}
    goals = [{n: torch.randn(s, generator=generator) for n, s in SHAPES.items()} for _ in range(2)]
    models = [{n: p.clone().requires_grad_() for n, p in start.items()} for _ in range(2)]
    ranks = [
        m.Replica(method, model, replica=r, replicas=2, backend=backend)
        for r, model in enumerate(models)
    ]
    pending, exchange = [], InProcess(ranks)
    for step in range(steps):
        sent = []
        for rank, model, goal in zip(ranks, models, goals, strict=True):
            rank.before_forward(step)
            for n, p in model.items():
                p.grad = p.detach() - goal[n]
            rank.local(0.03)
            sent.append(rank.send())
        if sent[0] is not None:
            pending.append(exchange.deliver(sent))
        while ranks[0].due():
            arrived = pending.pop(0)
            assert all(not rank.receive(arrived.messages, arrived.leave_out) for rank in ranks)
    assert any(not torch.equal(p, start[n]) for n, p in ranks[0].plain().items())
    return ranks[0].plain()


@pytest.mark.parametrize("name", METHODS)
def test_a_method_takes_kernels_alone_and_arrives_where_plain_pytorch_does(name, monkeypatch):
    plain = path(METHODS[name], "torch")
    implementation = backends.implementation
    taken = set()

    def kernels_alone(backend, operation):
        assert backend == "interpret", f"{operation} falls back to {backend}"
        taken.add(operation)
        return implementation(backend, operation)

    for module in ("encode", "apply", "outer", "quantise", "pack"):
        monkeypatch.setattr(f"psyche_fast.kernels.{module}.implementation", kernels_alone)
    mine = path(METHODS[name], "interpret")
    assert taken >= ({"quantise"} if METHODS[name].select == "all" else {"encode", "pack"})
    for n, p in mine.items():
        assert float((p - plain[n]).abs().max()) < 2e-5, n
