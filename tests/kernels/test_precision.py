"""Whether split bfloat16 is precise enough: which coefficients are kept, and where training goes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from psyche_fast import kernels
from psyche_fast.distro.layout import Layout, ParameterLayout
from psyche_fast.kernels.plan import Entries
from tests import oracles
from tests.kernels import support
from tests.kernels.support import f64, largest, one_class, transform, untransform

SIDE = 64
TILES = 128
AGREEMENT = 0.9999


def as_tiles(matrix):
    rows, columns = (n // SIDE for n in matrix.shape)
    return matrix.reshape(rows, SIDE, columns, SIDE).swapaxes(1, 2).reshape(-1, SIDE, SIDE)


def low_rank(rng, rows, columns, rank, spread):
    """A product of thin factors, rows of very different size, scaled to a variance of 1."""
    left = rng.standard_normal((rows, rank)) * np.exp(rng.standard_normal((rows, 1)))
    right = rng.standard_normal((columns, rank)) * np.exp(
        spread * rng.standard_normal((columns, 1))
    )
    product = (left * np.logspace(0, -2, rank)) @ right.T
    return product / product.std()


def gaussian(rng, rows, columns):
    return 1e-3 * rng.standard_normal((rows, columns))


def low_rank_and_noise(rng, rows, columns):
    noise = 0.5 * rng.standard_normal((rows, columns))
    return 1e-3 * (low_rank(rng, rows, columns, 32, 1.0) + noise)


def momentum(rng, rows, columns):
    """30 steps of low-rank gradients, the 8 largest coefficients taken out after each."""
    delta = np.zeros((rows * columns // SIDE**2, SIDE, SIDE))
    for number in range(30):
        noise = 0.5 * rng.standard_normal((rows, columns))
        gradient = as_tiles(low_rank(rng, rows, columns, 16, 0.3) + noise)
        delta = 0.999 * delta + 4e-4 * gradient
        if number < 29:
            coefficients = transform(delta)
            kept = np.zeros_like(coefficients)
            chosen = largest(coefficients, 8)
            np.put_along_axis(
                kept, chosen, np.take_along_axis(coefficients, chosen, axis=1), axis=1
            )
            delta -= untransform(kept, SIDE, SIDE)
    # From tiles back to a matrix, so that all data sets have one form.
    return (
        delta.reshape(rows // SIDE, columns // SIDE, SIDE, SIDE)
        .swapaxes(1, 2)
        .reshape(rows, columns)
    )


@pytest.fixture(scope="module", params=[gaussian, low_rank_and_noise, momentum])
def data(request):
    """float64 `[TILES, 64, 64]`."""
    return as_tiles(request.param(np.random.default_rng(0), TILES * 8, SIDE * 8))


@pytest.mark.parametrize("delta_dtype", [torch.float32, torch.bfloat16])
def test_the_coefficients_that_are_kept(data, delta_dtype, device, backend):
    """Of float64's 32 largest at most one in 10 000 is another; what is lost is next to nothing."""
    plan = one_class([(TILES * SIDE, SIDE)], k=32, device=device)
    delta = torch.from_numpy(data).to(device, delta_dtype)
    entries = kernels.encode(plan, delta, [None], [0.0], decay=1.0, backend=backend)
    support.check_selection(plan, entries, delta)
    exact = transform(f64(delta))
    indices, values = support.numbers(entries)
    for k in (32, 8):
        if k == 8:
            # The 8 largest of the 32: the selection is by magnitude, whatever k is.
            order = np.argsort(-np.abs(values), axis=1, kind="stable")[:, :8]
            indices = np.sort(np.take_along_axis(indices, order, axis=1), axis=1)
        best = largest(exact, k)
        common = sum(len(np.intersect1d(a, b)) for a, b in zip(indices, best, strict=True))
        assert common / best.size >= AGREEMENT
        energy = [(np.take_along_axis(exact, i, axis=1) ** 2).sum() for i in (indices, best)]
        assert 1 - energy[0] / energy[1] < 1e-8


SHAPES = {"matrix": (16, 24), "head": (11, 16), "column": (16, 11), "norm": (24,), "scalar": ()}
CHUNK, TOPK, PEERS, STEPS, DECAY = 8, 4, 4, 100, 0.95


def learning_rate(step):
    return 1e-2 / (1 + step / 50)


class Peer:
    """One peer on kernels: encode of every class, and apply of all peers' results."""

    def __init__(self, weights, dtype, backend, device):
        layouts = [
            ParameterLayout.of(
                name, shape, dtype, device, compression_chunk=CHUNK, compression_topk=TOPK
            )
            for name, shape in SHAPES.items()
        ]
        layout = Layout(layouts)
        self.plans, self.backend = layout.plans, backend
        self.deltas = layout.zeros()
        self.parameters = [torch.from_numpy(w).to(device, dtype) for w in weights.values()]
        self.ahead = [p.clone() for p in self.parameters]
        self.own = [None] * len(self.plans)

    def generate(self, gradients, lr):
        tensors = [torch.from_numpy(g).to(self.parameters[0]) for g in gradients.values()]
        for number, (plan, delta) in enumerate(zip(self.plans, self.deltas, strict=True)):
            self.own[number] = kernels.encode(
                plan,
                delta,
                [tensors[m.position] for m in plan.members],
                [lr] * len(plan.members),
                decay=DECAY,
                previous=self.own[number],
                backend=self.backend,
            )
        return self.own

    def apply(self, results, lr, weight_decay):
        for plan, delta, entries in zip(
            self.plans, self.deltas, zip(*results, strict=True), strict=True
        ):
            kernels.apply(
                plan,
                [self.parameters[m.position] for m in plan.members],
                Entries(
                    torch.cat([e.indices.int() for e in entries], 1).to(plan.index_dtype),
                    torch.cat([e.values for e in entries], 1),
                ),
                [lr] * len(plan.members),
                shrinks=[1 - lr * weight_decay] * len(plan.members),
                ahead=[self.ahead[m.position] for m in plan.members],
                delta=delta,
                backend=self.backend,
            )


def gradients_of(rng, weights):
    """What all peers have in common, and noise of their own: independent of the parameters, so that
    runs with different arithmetic stay comparable."""
    common = {name: rng.standard_normal(w.shape) for name, w in weights.items()}
    return [
        {name: np.asarray(c + 0.5 * rng.standard_normal(c.shape)) for name, c in common.items()}
        for _ in range(PEERS)
    ]


def train(weights, dtype, backend, device, *, arrivals=None):
    """Parameters of every peer after 100 steps; `arrivals` shuffles the results for each peer."""
    rng = np.random.default_rng(1)
    peers = [Peer(weights, dtype, backend, device) for _ in range(PEERS)]
    for step in range(STEPS):
        lr = learning_rate(step)
        gradients = gradients_of(rng, weights)
        results = [list(peer.generate(g, lr)) for peer, g in zip(peers, gradients, strict=True)]
        for peer in peers:
            order = range(PEERS) if arrivals is None else arrivals.permutation(PEERS)
            peer.apply([results[i] for i in order], lr, weight_decay=0.1)
    return peers


def train_in_float64(weights):
    """The same by the oracle; also how often an element's direction was a matter of rounding."""
    rng = np.random.default_rng(1)
    peer = oracles.DistroPeer(weights, decay=DECAY, topk=TOPK, chunk=CHUNK, weight_decay=0.1)
    peers = [oracles.DistroPeer(weights, decay=DECAY, topk=TOPK, chunk=CHUNK) for _ in range(PEERS)]
    own = [None] * PEERS
    for step in range(STEPS):
        lr = learning_rate(step)
        gradients = gradients_of(rng, weights)
        for i in range(PEERS):
            own[i] = peers[i].generate([own[i]] if own[i] else [], gradients[i], lr)
        for name, p in peer.parameters.items():
            peer.parameters[name] = p * (1 - lr * 0.1)
        peer.apply(own, lr)
    return peer.parameters


@pytest.fixture(scope="module")
def weights():
    rng = np.random.default_rng(0)
    return {name: np.asarray(rng.standard_normal(shape)) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_hundred_steps(dtype, weights, device, backend):
    """Four peers that hear of each other in different orders stay the same to the bit, and end
    where float64 does, but for the reference backend's own error in that dtype."""
    rounded = {n: f64(torch.from_numpy(w).to(dtype)) for n, w in weights.items()}
    peers = train(rounded, dtype, backend, device, arrivals=np.random.default_rng(2))
    for peer in peers[1:]:
        assert all(map(torch.equal, peer.parameters, peers[0].parameters))
    for peer in peers:
        assert not any(map(torch.equal, peer.ahead, peer.parameters))
    reference = train(rounded, dtype, "torch", device)[0]
    exact = train_in_float64(rounded)

    def error(of, to):
        differences = [f64(a) - b for a, b in zip(of, to, strict=True)]
        return np.sqrt(np.mean(np.concatenate([d.ravel() for d in differences]) ** 2))

    own = error(reference.parameters, exact.values())
    print(
        "own",
        own,
        "kernel",
        error(peers[0].parameters, exact.values()),
        "between",
        error(peers[0].parameters, [f64(p) for p in reference.parameters]),
    )
    moved = error([torch.from_numpy(w) for w in rounded.values()], exact.values())
    assert error(peers[0].parameters, exact.values()) <= 1.5 * own + 1e-3 * moved
    assert moved > 10 * learning_rate(0)
