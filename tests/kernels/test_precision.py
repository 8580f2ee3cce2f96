"""Whether split bfloat16 is precise enough: which coefficients are kept, where training goes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from psyche_fast.kernels.apply import apply
from psyche_fast.kernels.encode import encode
from psyche_fast.kernels.plan import Entries
from tests import oracles
from tests.kernels import support
from tests.kernels.support import f64, largest, one_class, transform

SIDE, K = 64, 32
ROWS, COLUMNS = 16 * SIDE, 32 * SIDE
FEW = 8
"""Tiles that the interpreter gets through in a second."""
AGREEMENT = 0.9999
BASIS = torch.from_numpy(oracles.dct_basis(SIDE))


def as_tiles(matrix):
    rows, columns = (n // SIDE for n in matrix.shape)
    return matrix.view(rows, SIDE, columns, SIDE).transpose(1, 2).reshape(-1, SIDE, SIDE)


def low_rank(rank, spread):
    """A product of thin factors, rows of very different size, of variance 1."""
    left = torch.randn(ROWS, rank) * torch.randn(ROWS, 1).exp()
    right = torch.randn(COLUMNS, rank) * (spread * torch.randn(COLUMNS, 1)).exp()
    product = (left * torch.logspace(0, -2, rank)) @ right.t()
    return product / product.std()


def gaussian():
    return as_tiles(1e-3 * torch.randn(ROWS, COLUMNS))


def low_rank_and_noise():
    return as_tiles(1e-3 * (low_rank(32, 1.0) + 0.5 * torch.randn(ROWS, COLUMNS)))


def momentum():
    """Steps of low-rank gradients with noise, the 8 largest coefficients taken out after each."""
    basis = BASIS.float()
    delta = as_tiles(torch.zeros(ROWS, COLUMNS))
    for _ in range(10):
        coefficients = (basis.t() @ delta @ basis).flatten(1)
        chosen = coefficients.abs().topk(8).indices
        kept = torch.zeros_like(coefficients)
        kept.scatter_(1, chosen, coefficients.gather(1, chosen))
        delta -= basis @ kept.view_as(delta) @ basis.t()
        gradient = low_rank(16, 0.3) + 0.5 * torch.randn(ROWS, COLUMNS)
        delta = 0.999 * delta + 4e-4 * as_tiles(gradient)
    return delta


@pytest.fixture(scope="module", params=[gaussian, low_rank_and_noise, momentum])
def tiles(request):
    """float32 `[512, 64, 64]`."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return request.param()


def two_parts(x, *, cut):
    """High and low part, 16 bits together, as float32: the high one cut off, or rounded."""
    high = (x.view(torch.int32) & -65536).view(torch.float32) if cut else x.bfloat16().float()
    return high, (x - high).bfloat16().float()


def product(a, b):
    """Of parts; sums are exact here, for those of float32 are off by what the processor makes."""
    a, b = ([part.double() for part in parts] for parts in (a, b))
    return ((a[1] @ b[0] + a[0] @ b[1]) + a[0] @ b[0]).float()


def emulated(x):
    """The kernels' forward transform in PyTorch, `[n, 4096]`: three products, two for bfloat16."""
    high, low = two_parts(BASIS.float(), cut=False)
    if x.dtype == torch.bfloat16:
        y = (x.double() @ low.double() + x.double() @ high.double()).float()
    else:
        y = product(two_parts(x, cut=True), (high, low))
    return product((high.t(), low.t()), two_parts(y, cut=True)).flatten(1)


def encoded(x, device, backend):
    plan = one_class([(len(x) * SIDE, SIDE)], k=K, device=device)
    delta = x.to(device, copy=True)
    entries = encode(plan, delta, [None], [0.0], decay=1.0, backend=backend)
    support.check_selection(plan, entries, delta)
    return support.numbers(entries)


@pytest.mark.parametrize("delta_dtype", [torch.float32, torch.bfloat16])
def test_kernels_compute_what_is_emulated(tiles, delta_dtype, device, backend):
    """So that the next test's many tiles speak for the kernels."""
    x = tiles[:FEW].to(delta_dtype)
    indices, values = encoded(x, device, backend)
    coefficients = f64(emulated(x))
    chosen = np.take_along_axis(coefficients, indices, axis=1)
    assert np.abs(values - chosen).max() <= 4e-6 * np.abs(coefficients).max()


@pytest.mark.parametrize("delta_dtype", [torch.float32, torch.bfloat16])
def test_the_coefficients_that_are_kept(tiles, delta_dtype, device, backend):
    """All but one in 10 000 are float64's, and the energy that is lost is next to nothing."""
    x = tiles.to(delta_dtype)
    exact = transform(f64(x))
    if device.type == "cuda":
        indices, _ = encoded(x, device, backend)
    else:
        indices = emulated(x).abs().topk(K).indices.numpy()
    best = largest(exact, K)
    kept, wanted = np.zeros((2, *exact.shape), dtype=bool)
    np.put_along_axis(kept, indices, True, axis=1)
    np.put_along_axis(wanted, best, True, axis=1)
    assert (kept & wanted).sum() / wanted.sum() >= AGREEMENT
    assert 1 - (exact[kept] ** 2).sum() / (exact[wanted] ** 2).sum() < 1e-9


CHUNK, TOPK, PEERS, STEPS, DECAY, WEIGHT_DECAY = 8, 4, 4, 20, 0.95, 0.1
SHAPES = {"matrix": (6, 8), "vector": (40,)}
"""One chunk, and five of a vector."""


def learning_rate(step):
    return 1e-2 / (1 + step / 50)


def gradients(shape):
    """What the peers have in common and noise of their own, `[PEERS, *shape]` for every step. They
    do not depend on the parameters, so that runs with different arithmetic stay comparable."""
    rng = np.random.default_rng(1)
    for _ in range(STEPS):
        yield rng.standard_normal(shape) + 0.5 * rng.standard_normal((PEERS, *shape))


def train(weight, dtype, device, backend, *, shuffle):
    """Parameters and look-ahead of every peer, `[PEERS, *shape]`, after 20 steps.

    The peers are the members of one class, which spares launches; each takes all results, with
    `shuffle` in an order of its own.
    """
    plan = one_class([weight.shape] * PEERS, k=TOPK, device=device, dtype=dtype, chunk=CHUNK)
    parameters = list(torch.from_numpy(np.stack([weight] * PEERS)).to(device, dtype))
    ahead = [p.clone() for p in parameters]
    delta = torch.zeros(plan.chunks, plan.h, plan.w, device=device)
    rng, own = np.random.default_rng(2), None
    for step, of_peers in enumerate(gradients(weight.shape)):
        rates = [learning_rate(step)] * PEERS
        given = list(torch.from_numpy(of_peers).to(device, dtype))
        options = {"decay": DECAY, "previous": own, "backend": backend}
        own = encode(plan, delta, given, rates, **options)
        # [peers, chunks, k] to [chunks, peers * k], once for each peer that receives them
        parts = [t.view(PEERS, -1, TOPK) for t in (own.indices.int(), own.values)]
        orders = [rng.permutation(PEERS) if shuffle else range(PEERS) for _ in range(PEERS)]
        received = [torch.cat([torch.cat([*part[list(o)]], 1) for o in orders]) for part in parts]
        entries = Entries(received[0].to(plan.index_dtype), received[1])
        shrinks = [1 - rate * WEIGHT_DECAY for rate in rates]
        options = {"shrinks": shrinks, "ahead": ahead, "delta": delta, "backend": backend}
        apply(plan, parameters, entries, rates, **options)
    return parameters, ahead


def train_in_float64(weight):
    """The oracle's parameters, and how many elements were ever in doubt."""
    settings = {"decay": DECAY, "topk": TOPK, "chunk": CHUNK}
    peers = [oracles.DistroPeer({"w": weight}, **settings) for _ in range(PEERS)]
    own, doubtful = [[]] * PEERS, np.zeros(weight.shape, dtype=bool)
    for step, of_peers in enumerate(gradients(weight.shape)):
        lr = learning_rate(step)
        own = [
            [peer.generate(sent, {"w": gradient}, lr)]
            for peer, sent, gradient in zip(peers, own, of_peers, strict=True)
        ]
        results = [sent[0]["w"] for sent in own]
        update = oracles.decode_mean(weight.shape, CHUNK, results)
        scale = max(abs(v) for result in results for _, values in result for v in values)
        doubtful |= np.abs(update) < support.TOLERANCE * scale
        weight = weight * (1 - lr * WEIGHT_DECAY) - lr * np.sign(update)
    return weight, doubtful


@pytest.mark.parametrize(("name", "dtype"), [("matrix", torch.float32), ("vector", torch.bfloat16)])
def test_twenty_steps(name, dtype, device, backend):
    """Four peers that hear of each other in different orders stay the same to the bit, and end
    where float64 does, within the error that the reference backend makes in that dtype."""
    rng = np.random.default_rng(0)
    weight = f64(torch.from_numpy(rng.standard_normal(SHAPES[name])).to(dtype))
    parameters, ahead = train(weight, dtype, device, backend, shuffle=True)
    assert all(torch.equal(p, parameters[0]) for p in parameters[1:])
    assert not any(torch.equal(p, a) for p, a in zip(parameters, ahead, strict=True))
    reference, _ = train(weight, dtype, device, "torch", shuffle=False)
    exact, doubtful = train_in_float64(weight)
    sure = ~doubtful
    assert sure.mean() > 0.9
    own = np.abs(f64(reference[0]) - exact)[sure]
    error = np.abs(f64(parameters[0]) - exact)[sure]
    between = np.abs(f64(parameters[0]) - f64(reference[0]))[sure]
    assert between.max() <= own.max()
    assert error.max() <= 1.1 * own.max()
    assert math.sqrt((error**2).mean()) <= 1.1 * math.sqrt((own**2).mean())
    assert np.abs(exact - weight).mean() > 2 * learning_rate(0)
