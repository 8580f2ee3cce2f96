"""What other implementations are known to get wrong: each is a path that ours is not on."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from psyche_fast import methods as m
from psyche_fast.methods.chunked import Fragment
from psyche_fast.methods.values import dequantise, quantise
from tests.methods import oracle

NAMES = {"layers.0.a": (8, 12), "layers.1.a": (7, 11), "layers.2.b": (2, 4, 6), "norm": (13,)}
INNER = m.AdamW(betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)


def start():
    rng = np.random.default_rng(3)
    return {n: rng.normal(size=s) for n, s in NAMES.items()}


GOALS = [{n: np.random.default_rng(r).normal(size=s) for n, s in NAMES.items()} for r in range(3)]


def gradient(replica, step, values):
    return {n: values[n] - GOALS[replica][n] for n in NAMES}


def of_tensors(replica, step, values):
    found = gradient(replica, step, {n: p.numpy() for n, p in values.items()})
    return {n: torch.tensor(g) for n, g in found.items()}


def path(method, *, replicas=3, steps=12, learning_rate=0.02, gradient=of_tensors):
    tensors = {n: torch.tensor(p) for n, p in start().items()}
    return m.simulate(
        method, tensors, gradient, replicas=replicas, steps=steps, learning_rate=learning_rate
    )


def off(mine, theirs):
    """The largest difference at the end."""
    return max(np.abs(p.numpy() - theirs[-1][n]).max() for n, p in mine[-1].items())


def sparse(**overrides):
    fields = {"every": 3, "k": 3, "chunk": 8, "decay": 0.9, "values": "parameter", "inner": INNER}
    return m.get("sparseloco", **{**fields, **overrides})


def sparse_oracle(run=oracle.local, **overrides):
    options = {
        "replicas": 3, "steps": 12, "every": 3, "inner": oracle.AdamW, "how": "topk", "k": 3,
        "feedback": "sent", "beta": 0.9, "merge": "named",
    }  # fmt: skip
    return run(start(), gradient, lambda step: 0.02, **{**options, **overrides})


def test_the_outer_rate_counts_once():
    mine = path(sparse(outer=m.SGD(rate=0.7)))
    assert off(mine, sparse_oracle(eta_o=0.7)) < 1e-12
    assert off(mine, sparse_oracle(eta_o=0.49)) > 1e-3


def test_chunks_are_blocks_and_not_rows(monkeypatch):
    mine = path(sparse())
    assert off(mine, sparse_oracle()) < 1e-12

    def rows(array, chunk, transform):
        return [(*i, slice(None)) for i in np.ndindex(*array.shape[:-1])]

    monkeypatch.setattr(oracle, "windows", rows)
    assert off(mine, sparse_oracle()) > 1e-3


def test_the_outer_step_goes_down():
    mine = path(sparse(), replicas=1)
    right = np.abs(mine[-1]["norm"].numpy() - GOALS[0]["norm"]).mean()
    assert right < np.abs(start()["norm"] - GOALS[0]["norm"]).mean()


def test_mean_over_those_that_name_an_entry_is_not_that_over_all():
    mine, mean = path(sparse()), path(sparse(merge="mean"))
    assert off(mine, sparse_oracle(merge="mean")) > 1e-3
    assert off(mean, sparse_oracle(merge="mean")) < 1e-12


def test_feedback_keeps_the_error_of_what_was_sent():
    """With `sent` and no decay, what was sent and what is kept are all that has come in."""
    mine = path(sparse(values="2bit"))
    assert off(mine, sparse_oracle(kind="2bit")) < 1e-12
    assert off(mine, sparse_oracle(kind="2bit", feedback="exact")) > 1e-4


@pytest.mark.parametrize("fragments", [1, 2])
def test_an_outer_step_moves_its_fragment_alone(fragments):
    method = m.get(
        "streaming-diloco", every=6, fragments=fragments, delay=1, mix=0.5, values="parameter",
        inner=INNER,
    )  # fmt: skip
    found = path(method, steps=12)
    moved = [
        {n for n in NAMES if not torch.equal(before[n], after[n])}
        for before, after in itertools.pairwise(found)
    ]
    first, second = {"layers.0.a", "layers.2.b", "norm"}, {"layers.1.a"}
    window = 6 // fragments
    for step, names in enumerate(moved, start=1):
        turn, left = divmod(step + 1, window)
        part = set(NAMES) if fragments == 1 else (second, first)[turn % 2]
        assert names == (part if left == 0 else set())


def test_mixing_counts_and_the_anchor_is_never_the_mixture():
    fields = {"every": 6, "fragments": 1, "delay": 2, "values": "parameter", "inner": INNER}
    options = {"replicas": 3, "steps": 18, "every": 6, "delay": 2, "inner": oracle.AdamW}
    paths = {}
    for mix in (0.0, 0.5, "rebase"):
        paths[mix] = path(m.get("streaming-diloco", mix=mix, **fields), steps=18)
        wanted = oracle.local(
            start(), gradient, lambda step: 0.02, mix=mix, eta_o=0.4, mu=0.9, **options
        )
        assert off(paths[mix], wanted) < 1e-12
    for one, other in ((0.0, 0.5), (0.5, "rebase"), (0.0, "rebase")):
        assert not torch.equal(paths[one][-1]["norm"], paths[other][-1]["norm"])


def test_the_schedule_goes_by_inner_steps_and_not_by_rounds():
    asked = []

    def rate(step):
        asked.append(step)
        return 0.01

    path(sparse(), steps=7, learning_rate=rate)
    assert asked == list(range(7))


def test_a_gradient_that_is_not_finite_is_left_out_whole():
    for method in (m.get("demo", chunk=8, k=3), sparse(every=1), m.get("dense", chunk=8)):

        def torn(replica, step, values):
            found = of_tensors(replica, step, values)
            if step == 1:
                found["norm"][3] = float("nan")
            return found

        def none(replica, step, values):
            return {} if step == 1 else of_tensors(replica, step, values)

        mine, wanted = path(method, steps=3, gradient=torn), path(method, steps=3, gradient=none)
        for n in NAMES:
            assert torch.equal(mine[-1][n], wanted[-1][n])


def test_parameters_stay_where_they_are():
    p = torch.zeros(8, 8, requires_grad=True)
    replica = m.Replica(sparse(every=1), {"p": p}, replica=0, replicas=1)
    place = p.data_ptr()
    for step in range(3):
        replica.before_forward(step)
        p.grad = torch.ones_like(p)
        replica.local(0.1)
        replica.receive(replica.send().unsqueeze(0))
    assert p.data_ptr() == place
    assert not torch.equal(p, torch.zeros(8, 8))


def fragment(values, shape, chunk):
    method = sparse(values=values, chunk=chunk, k=min(3, chunk * chunk))
    return Fragment(method, 0, ["p"], [torch.zeros(shape, dtype=torch.float64)], "auto")


def test_two_levels_per_chunk_lose_far_less_than_one_codebook_where_chunks_differ():
    plan = fragment("2bit", (64, 64), 8).layout.plans[0]
    generator = torch.Generator().manual_seed(0)
    scales = torch.randn(plan.chunks, 1, generator=generator, dtype=torch.float64).exp()
    values = torch.randn(plan.chunks, 256, generator=generator, dtype=torch.float64)
    kept = values.abs().topk(16).indices
    values = scales * values.gather(1, kept)
    error = {
        kind: float((dequantise(plan, kind, quantise(plan, kind, values)) - values).square().sum())
        for kind in ("2bit", "codebook4")
    }
    assert error["codebook4"] > 20 * error["2bit"]
    assert error["2bit"] < 0.01 * float(values.square().sum())


def test_a_codebook_of_one_value_an_odd_number_or_equal_ones_is_exact():
    for shape, chunk in (((), 1), ((1, 1), 4), ((3, 5), 1), ((7,), 2)):
        plan = fragment("codebook4", shape, chunk).layout.plans[0]
        values = torch.full((plan.chunks, plan.k), -0.375, dtype=torch.float64)
        assert torch.equal(
            dequantise(plan, "codebook4", quantise(plan, "codebook4", values)), values
        )


@pytest.mark.parametrize("values", ["2bit", "4bit", "8bit", "codebook4"])
def test_chunks_of_zeros_are_zero(values):
    plan = fragment(values, (8, 8), 4).layout.plans[0]
    zeros = torch.zeros(plan.chunks, plan.k, dtype=torch.float64)
    assert torch.equal(dequantise(plan, values, quantise(plan, values, zeros)), zeros)


def bytes_of(method, shape=(2048, 2048)):
    """Bytes a 4096-chunk and inner step, of a whole round's messages."""
    p = torch.zeros(shape, requires_grad=True)
    replica = m.Replica(method, {"p": p}, replica=0, replicas=2)
    sent = sum(replica.bytes_sent(step) for step in range(method.every, 2 * method.every))
    return sent / method.every / (math.prod(shape) / 4096)


def test_bytes_on_the_wire():
    assert bytes_of(m.get("distro", k=2)) < 3.5
    assert bytes_of(m.get("sparseloco")) < 2.9
    assert bytes_of(m.get("random-k")) < 3.5
    assert bytes_of(m.get("diloco", every=100, values="8bit")) < 41.1
    assert bytes_of(m.get("diloco", every=100, values="2bit")) < 10.4
    assert bytes_of(m.get("muloco")) < 68.6
    assert bytes_of(m.get("dense")) < 8192.1


def test_what_is_small_has_a_sign_too():
    """A chunk of small values beside one of large ones, in float32."""
    method = m.get("demo", k=4, chunk=2, transform="none", merge="mean")
    p = torch.zeros(2, 4, requires_grad=True)
    replica = m.Replica(method, {"p": p}, replica=0, replicas=1)
    p.grad = torch.tensor([[1e6, 1e6, 1e-3, -1e-3]] * 2)
    replica.local(0.5)
    replica.receive(replica.send().unsqueeze(0))
    assert torch.equal(p.detach(), torch.tensor([[-0.5, -0.5, -0.5, 0.5]] * 2))
