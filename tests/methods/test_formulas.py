"""Every method's path is that of its formulas, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from psyche_fast import methods as m
from tests.methods import oracle

# Odd, prime and square sides, sides that chunks of 8 do not divide, three dimensions, vectors that
# are one chunk or several without transform, and a scalar.
SHAPES = {
    "layers.0.a": (8, 12), "layers.0.b": (13,), "layers.1.a": (6, 10), "layers.2.a": (7, 11),
    "layers.2.b": (2, 4, 6), "layers.3.a": (16, 8), "norm": (130,), "scale": (),
}  # fmt: skip
INNER = m.AdamW(betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)


def world(seed=0):
    """Parameters at first, and gradients that depend on replica, step and parameters."""
    rng = np.random.default_rng(seed)
    start = {n: rng.normal(size=s) for n, s in SHAPES.items()}
    goals = [{n: rng.normal(size=s) for n, s in SHAPES.items()} for _ in range(3)]
    noise = rng.normal(size=64)

    def gradient(replica, step, values):
        return {
            n: np.sin(values[n] - goals[replica][n]) + 0.3 * noise[step] * goals[replica - 1][n]
            for n in SHAPES
        }

    return start, gradient


def rate(step):
    return 0.02 * (1 - step / 40)


def flat(gradient, start):
    """The oracle's arrays have at least one dimension."""
    wide = {n: np.atleast_1d(p) for n, p in start.items()}

    def wrapped(replica, step, values):
        narrow = {n: p.reshape(SHAPES[n]) for n, p in values.items()}
        return {n: np.atleast_1d(g) for n, g in gradient(replica, step, narrow).items()}

    return wide, wrapped


def compare(method, run, replicas, steps=8, **options):
    """The largest difference of any parameter at any step is below 1e-12."""
    start, gradient = world()
    wide, wrapped = flat(gradient, start)
    wanted = run(wide, wrapped, rate, replicas=replicas, steps=steps, **options)

    def of_tensors(replica, step, values):
        found = gradient(replica, step, {n: p.numpy() for n, p in values.items()})
        return {n: torch.tensor(g) for n, g in found.items()}

    tensors = {n: torch.tensor(p, dtype=torch.float64) for n, p in start.items()}
    got = m.simulate(
        method, tensors, of_tensors, replicas=replicas, steps=steps, learning_rate=rate
    )
    assert len(got) == steps
    for step, (mine, theirs) in enumerate(zip(got, wanted, strict=True)):
        for n, p in mine.items():
            assert p.dtype == torch.float64
            assert p.shape == SHAPES[n]
            worst = np.abs(p.numpy().reshape(-1) - theirs[n].reshape(-1)).max()
            assert worst < 1e-12, (step, n, worst)
    assert any(not np.array_equal(got[-1][n].numpy(), p) for n, p in start.items())
    return got


SMALL = {"k": 3, "chunk": 8}


def paired(*cases):
    """Cases with 2 and 3 replicas in turn, the first with both."""
    return [(3, *cases[0]), *((2 + at % 2, *case) for at, case in enumerate(cases))]


@pytest.mark.parametrize(
    ("replicas", "values", "subtract"),
    [(2, "parameter", 1.0), (3, "parameter", 0.4), (2, "sign", 0.4), (3, "sign", 1.0),
     (3, "8bit", 0.7)],
)  # fmt: skip
def test_distro(replicas, values, subtract):
    method = m.get("distro", decay=0.95, values=values, subtract=subtract, **SMALL)
    compare(
        method, oracle.momentum, replicas, beta=0.95, kind=values, alpha=subtract, delay=1,
        ahead=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("replicas", "overrides", "options"),
    paired(
        ({}, {}),
        ({"subtract": 1.0}, {"alpha": 1.0}),
        ({"outer": m.SGD(rate=0.7)}, {"phi": "linear", "length": 0.7}),
        ({"outer": m.SGD(), "gain": "one"}, {"phi": "linear", "gain": "one"}),
        ({"outer": m.SGD(), "gain": "ema"}, {"phi": "linear", "gain": "ema"}),
        ({"outer": m.SGD(), "values": "sign"}, {"phi": "linear", "kind": "sign"}),
        (
            {"outer": m.Nesterov(rate=0.5, momentum=0.8)},
            {"phi": "linear", "length": 0.5, "mu": 0.8},
        ),
        ({"outer": m.Muon()}, {"phi": "muon"}),
        ({"outer": m.Sign(weight_decay=0.3)}, {"decay": 0.3}),
        ({"merge": "mean", "k": 5}, {"merge": "mean", "k": 5}),
        ({"values": "2bit", "feedback": "sent"}, {"kind": "2bit", "feedback": "sent"}),
        ({"transform": "none"}, {"transform": False}),
        ({"delay": 2}, {"delay": 2}),
        ({"feedback": "none", "subtract": 1.0}, {"feedback": "none"}),
    ),
    ids=str,
)  # fmt: skip
def test_demo_v2(replicas, overrides, options):
    method = m.get("demo-v2", **{"decay": 0.95, **SMALL, **overrides})
    compare(method, oracle.momentum, replicas, **{"beta": 0.95, "alpha": 0.2, **options})


def test_demo_takes_out_all_of_what_it_sends():
    compare(m.get("demo", decay=0.9, **SMALL), oracle.momentum, 2, beta=0.9)


SPARSE = {"how": "topk", "feedback": "sent", "merge": "named"}


@pytest.mark.parametrize(
    ("replicas", "overrides", "options"),
    paired(
        ({"outer": m.SGD(rate=0.7)}, {"eta_o": 0.7}),
        ({"merge": "mean"}, {"merge": "mean"}),
        ({"clip": "median"}, {"clip": True}),
        ({"values": "2bit"}, {"kind": "2bit"}),
        ({"values": "codebook4"}, {"kind": "codebook4"}),
        ({"values": "4bit", "k": 9}, {"kind": "4bit", "k": 9}),
        ({"values": "2bit", "clip": "median", "merge": "mean"},
         {"kind": "2bit", "clip": True, "merge": "mean"}),
        ({"values": "bf16", "feedback": "exact"}, {"kind": "bf16", "feedback": "exact"}),
        ({"subtract": 0.5}, {"alpha": 0.5}),
        ({"delay": 1, "mix": "rebase"}, {"delay": 1, "mix": "rebase"}),
        ({"transform": "dct"}, {"transform": True}),
        ({"select": "random"}, {"how": "random"}),
        ({"reduce": "owners"}, {"owners": "parameter"}),
        ({"reduce": "owners", "values": "2bit"}, {"kind": "2bit", "owners": "4bit"}),
        ({"reduce": "owners", "values": "8bit", "merge": "mean", "feedback": "exact"},
         {"kind": "8bit", "merge": "mean", "feedback": "exact", "owners": "8bit"}),
    ),
    ids=str,
)  # fmt: skip
def test_sparseloco(replicas, overrides, options):
    common = {"every": 3, "decay": 0.9, "values": "parameter", "inner": INNER, **SMALL}
    method = m.get("sparseloco", **{**common, **overrides})
    options = {**SPARSE, "every": 3, "beta": 0.9, "inner": oracle.AdamW, **options}
    compare(method, oracle.local, replicas, **options)


@pytest.mark.parametrize(
    ("replicas", "values"),
    paired(("parameter",), ("bf16",), ("8bit",), ("4bit",), ("2bit",)),
)
def test_diloco(replicas, values):
    method = m.get(
        "diloco", every=4, values=values, chunk=8, outer=m.Nesterov(rate=0.5, momentum=0.8),
        inner=m.AdamW(betas=(0.8, 0.99), eps=1e-6, weight_decay=0.3),
    )  # fmt: skip
    compare(
        method, oracle.local, replicas, every=4, kind=values, eta_o=0.5, mu=0.8,
        inner=lambda: oracle.AdamW((0.8, 0.99), 1e-6, 0.3),
    )  # fmt: skip


THREE = [
    ["layers.0.a", "layers.0.b", "layers.3.a", "norm", "scale"],
    ["layers.1.a"],
    ["layers.2.a", "layers.2.b"],
]


@pytest.mark.parametrize(
    ("replicas", "every", "fragments", "delay", "mix"),
    [(2, 6, 1, 2, "rebase"), (3, 6, 1, 5, 0.0), (2, 6, 1, 2, 0.5), (3, 6, 3, 0, 0.0),
     (2, 9, 3, 2, 0.5), (3, 9, 3, 2, "rebase"), (1, 9, 3, 1, 1.0), (2, 6, 1, 0, "rebase")],
)  # fmt: skip
def test_streaming_diloco(replicas, every, fragments, delay, mix):
    method = m.get(
        "streaming-diloco", every=every, fragments=fragments, delay=delay, mix=mix,
        values="parameter", outer=m.Nesterov(rate=0.5, momentum=0.8), inner=INNER,
    )  # fmt: skip
    compare(
        method, oracle.local, replicas, steps=19, every=every, delay=delay, mix=mix, eta_o=0.5,
        mu=0.8, inner=oracle.AdamW, fragments=(None,) if fragments == 1 else THREE,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("replicas", "nesterov", "values"),
    [(2, True, "parameter"), (3, False, "parameter"), (3, True, "4bit")],
)
def test_muloco(replicas, nesterov, values):
    inner = m.Muon(momentum=0.9, nesterov=nesterov, adamw=INNER)
    method = m.get("muloco", every=3, chunk=8, values=values, inner=inner)
    compare(
        method, oracle.local, replicas, every=3, eta_o=0.7, mu=0.6, kind=values, beta=0.9,
        feedback="sent", inner=lambda: oracle.Muon(0.9, nesterov),
    )  # fmt: skip


@pytest.mark.parametrize(("replicas", "values"), [(2, "sign"), (3, "parameter")])
def test_random_k(replicas, values):
    method = m.get("random-k", k=5, chunk=8, decay=0.9, values=values, seed=7)
    compare(
        method, oracle.momentum, replicas, beta=0.9, k=5, how="random", transform=False, seed=7,
        kind=values, phi="linear", merge="mean",
    )  # fmt: skip


@pytest.mark.parametrize(("replicas", "values"), [(1, "parameter"), (3, "bf16"), (2, "8bit")])
def test_dense(replicas, values):
    method = m.get("dense", values=values, chunk=8, outer=INNER)
    compare(
        method, oracle.data_parallel, replicas, optimizer=oracle.AdamW(), kind=values
    )  # fmt: skip


def test_dense_with_muon_outside():
    method = m.get("dense", values="parameter", outer=m.Muon(momentum=0.9, adamw=INNER))
    compare(method, oracle.data_parallel, 2, optimizer=oracle.Muon(0.9, True))


def test_one_replica_that_rebases_goes_as_its_inner_optimiser_alone():
    method = m.get(
        "streaming-diloco", every=12, fragments=1, delay=5, mix="rebase", values="parameter",
        outer=m.SGD(rate=1.0), inner=INNER,
    )  # fmt: skip
    start, gradient = world()

    def of_tensors(replica, step, values):
        found = gradient(replica, step, {n: p.numpy() for n, p in values.items()})
        return {n: torch.tensor(g) for n, g in found.items()}

    tensors = {n: torch.tensor(p, dtype=torch.float64) for n, p in start.items()}
    path = m.simulate(method, tensors, of_tensors, replicas=1, steps=24, learning_rate=rate)
    values, plain, paths = {n: p.copy() for n, p in start.items()}, oracle.AdamW(), []
    for t in range(24):
        plain.step(values, gradient(0, t, values), rate(t))
        paths.append({n: p.copy() for n, p in values.items()})
    for n in SHAPES:  # what was sent after 19 steps lands after 24
        assert np.abs(path[23][n].numpy() - paths[18][n]).max() < 1e-12
