"""Directions against their definition in int64, bit for bit: every backend, shape and kind."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from psyche_fast.integers import definition_hash, integer_basis
from psyche_fast.kernels import backends
from psyche_fast.kernels.apply import apply
from psyche_fast.kernels.plan import Entries
from psyche_fast.kernels.reference import direction
from tests.kernels import definition
from tests.kernels.support import from_chunks, one_class

SHAPES = {
    "64x64": (128, 64),
    "63x48": (63, 48),
    "33x7": (66, 7),
    "5x5": (5, 35),
    "50x50": (50, 100),
    "16x16": (32, 16),
    "2x64": (2, 128),
    "1x64": (192,),
    "1x50": (1, 100),
    "64x1": (128, 1),
    "13x1": (26, 1),
    "1x1": (67,),
}
"""Powers of two, padded sides, odd ones, rows, columns; two chunks or more."""


def entries_of(plan, kind, peers, *, signs, seed=0):
    """Entries of `peers` results.

    - "random": distinct ones in each result.
    - "same": all peers name the same, so that most coefficients are means.
    - "pairs": coefficients (a, b) and (b, a) of opposite sign: zero on the diagonal.
    - "spread": magnitudes over 40 powers of two.
    - "one": one coefficient, whose basis function has exact zeros.
    """
    generator = torch.Generator().manual_seed(seed)
    k = {"one": 1, "pairs": 2}.get(kind, plan.k)
    count = 1 if kind == "same" else peers
    order = torch.rand(plan.chunks, count, plan.totalk, generator=generator).argsort(-1)
    indices = order[..., :k].expand(-1, peers, -1).clone()
    values = torch.randn(indices.shape, generator=generator)
    if kind == "pairs" and plan.h == plan.w > 1:
        row, column = indices[..., 0] // plan.w, indices[..., 0] % plan.w
        indices[..., 1] = column * plan.w + row
        values[..., 1] = -values[..., 0]
    if kind == "spread":
        values *= 2.0 ** torch.randint(-40, 1, values.shape, generator=generator)
    values = values.flatten(1).to(plan.dtype)
    indices = indices.flatten(1).to(plan.index_dtype)
    return Entries(indices, values < 0 if signs else values, unique=peers == 1)


def wanted(plan, entries):
    """int64 `[chunks, h, w]`, by the definition."""
    values = entries.values.cpu()
    values = values.numpy() if values.dtype == torch.bool else values.double().numpy()
    indices = entries.indices.cpu().to(torch.int64).numpy()
    return definition.directions(indices, values, plan.h, plan.w)


def moved(plan, shape, entries, device, backend):
    """Where zeros have gone by a step of 1, `[*shape]`."""
    parameter = torch.zeros(shape, dtype=plan.dtype, device=device)
    on_device = Entries(entries.indices.to(device), entries.values.to(device), entries.unique)
    apply(plan, [parameter], on_device, [1.0], backend=backend)
    assert not (parameter.signbit() & (parameter == 0)).any(), "a step of -0"
    return parameter.double().cpu().numpy()


KINDS = [("random", 1), ("random", 4), ("same", 3), ("spread", 2), ("pairs", 1), ("one", 1)]


@pytest.mark.parametrize("signs", [True, False])
@pytest.mark.parametrize(("kind", "peers"), KINDS)
@pytest.mark.parametrize("name", SHAPES)
def test_the_reference_is_the_definition(name, kind, peers, signs):
    check(name, kind, peers, signs, torch.device("cpu"), "torch")


def check(name, kind, peers, signs, device, backend, k=6):
    shape = SHAPES[name]
    plan = one_class([shape], k=k, device=device)
    entries = entries_of(plan, kind, peers, signs=signs)
    right = from_chunks(wanted(plan, entries), shape)
    assert (moved(plan, shape, entries, device, backend) == -right).all()


@pytest.mark.parametrize("signs", [True, False])
@pytest.mark.parametrize("name", SHAPES)
def test_the_kernels_are_the_definition(name, signs, device, backend):
    kinds = KINDS if name in ("63x48", "1x50") else [("same", 3)]
    for kind, peers in kinds:
        check(name, kind, peers, signs, device, backend)


@pytest.mark.parametrize("signs", [True, False])
@pytest.mark.parametrize(
    ("name", "peers", "k"),
    [
        ("64x64", 130, 8),  # more than one pass
        ("33x7", 256, 231),
        ("16x16", 10, 128),
        ("1x64", 40, 8),
        ("5x5", 1400, 25),  # words of 64 bits for signs too
        ("1x1", 300, 1),
    ],
)
def test_many_entries(name, peers, k, signs, device, backend):
    check(name, "same" if peers > 1000 else "random", peers, signs, device, backend, k=k)
    check(name, "same", peers, signs, torch.device("cpu"), "torch", k=k)


def test_too_many_entries_are_refused():
    plan = one_class([(1,)], k=1, device=torch.device("cpu"))
    entries = Entries(torch.zeros(1, 65536, dtype=plan.index_dtype), torch.zeros(1, 65536))
    with pytest.raises(ValueError, match="65536 entries of a chunk: apply takes up to 65535"):
        apply(plan, [torch.zeros(1)], entries, [1.0])


@pytest.mark.parametrize("shape", [(130, 70), (70,), (3, 200)])
def test_longer_sides(shape):
    """Which the kernels do not take: sums that float32 cannot hold."""
    plan = one_class([shape], k=40, device=torch.device("cpu"), chunk=256)
    for signs in (True, False):
        entries = entries_of(plan, "random", 3, signs=signs)
        right = from_chunks(wanted(plan, entries), shape, 256)
        assert (moved(plan, shape, entries, "cpu", "torch") == -right).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e35])
def test_magnitudes(scale, dtype):
    plan = one_class([(64, 64)], k=8, device=torch.device("cpu"), dtype=dtype)
    entries = entries_of(plan, "random", 3, signs=False)
    entries = Entries(entries.indices, (entries.values.double() * scale).to(dtype))
    right, before = from_chunks(wanted(plan, entries), (64, 64)), entries.values.clone()
    assert (moved(plan, (64, 64), entries, "cpu", "torch") == -right).all()
    assert torch.equal(entries.values, before)


@pytest.mark.parametrize("peers", [1, 3, 24])
@pytest.mark.parametrize("name", ["64x64", "33x7", "1x64"])
def test_the_filter_leaves_nothing_wrong(name, peers, monkeypatch):
    """Values chosen so that elements nearly vanish: the same as with all rows exact."""
    shape = SHAPES[name]
    plan = one_class([shape] * 4, k=8, device=torch.device("cpu"))
    for signs in (True, False):
        entries = nearly_zero(plan, entries_of(plan, "random", peers, signs=signs, seed=3))
        filtered = minus_direction(plan, entries).clone()
        with monkeypatch.context() as patch:
            patch.setattr(direction.Descent, "_errors", doubt_all)
            exact = minus_direction(plan, entries)
        assert torch.equal(filtered, exact)
        assert torch.equal(exact.to(torch.int64), -torch.from_numpy(wanted(plan, entries)))


def minus_direction(plan, entries):
    return direction.Descent(plan, entries, 0, plan.chunks).chunks(0, plan.chunks)


def doubt_all(self):
    return torch.full((len(self.c), 1), math.inf), 0.0


def nearly_zero(plan, entries):
    """The last entry of every chunk chosen so that one element comes out as near zero as can be."""
    if entries.values.dtype == torch.bool:
        return entries
    indices, values = entries.indices.to(torch.int64), entries.values.clone()
    basis = [integer_basis(n).numpy() / 2.0**18 for n in (plan.h, plan.w)]
    for chunk in range(plan.chunks):
        at = indices[chunk].numpy()
        terms = basis[0][chunk % plan.h, at // plan.w] * basis[1][chunk % plan.w, at % plan.w]
        counts = (at[:, None] == at).sum(1)
        rest = (terms * values[chunk].double().numpy() / counts)[:-1].sum()
        if abs(terms[-1]) > 0.1:
            values[chunk, -1] = -rest * counts[-1] / terms[-1]
    return Entries(entries.indices, values, entries.unique)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["16x16", "1x50"])
def test_decay_and_step_are_rounded_one_by_one(name, dtype, device, backend):
    """To float32 each, and then once to the parameter's dtype; the same by every backend."""
    shape, rate, shrink = SHAPES[name], np.float32(0.01), np.float32(0.9876)
    plan = one_class([shape], k=6, device=device, dtype=dtype)
    entries = entries_of(plan, "random", 3, signs=True)
    start = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    step = -rate * from_chunks(wanted(plan, entries), shape).astype(np.float32)
    exact = torch.from_numpy(start.float().numpy() * shrink + step).to(dtype)
    for own, where in (("torch", torch.device("cpu")), (backend, device)):
        parameter = start.to(where, copy=True)
        sent = Entries(entries.indices.to(where), entries.values.to(where))
        plan = one_class([shape], k=6, device=where, dtype=dtype)
        apply(plan, [parameter], sent, [float(rate)], shrinks=[float(shrink)], backend=own)
        assert torch.equal(parameter.cpu(), exact)


def test_a_device_that_adds_up_otherwise_is_refused_in_one_line(device, backend, monkeypatch):
    plan = one_class([(64, 64)], k=1, device=device)
    for name in ("torch", backend):
        assert backends.checked_backend(plan, name) == name
        module = backends.implementation(name, "apply")
        products = module.exact_products
        monkeypatch.setattr(module, "exact_products", lambda a, b, p=products: p(a, b) * (1 + 2e-7))
        backends._check_products.cache_clear()
        with pytest.raises(ValueError, match="sums of products of integers wrong") as refused:
            backends.checked_backend(plan, name)
        assert "\n" not in str(refused.value)
    backends._check_products.cache_clear()


def test_tables_are_the_same_by_any_cosine():
    """No entry lies so near the middle of two integers that a library's last bit decides."""
    for n in range(1, 65):
        j, b = np.arange(n)[:, None], np.arange(n)[None, :]
        scale = np.where(b == 0, math.sqrt(0.5), 1.0) * 2.0**18
        exact = scale * np.cos(np.pi * ((2 * j + 1) * b % (4 * n)) / (2 * n))
        assert np.abs(np.abs(exact - np.floor(exact)) - 0.5).min() > 1e-7
        assert (integer_basis(n).numpy() == definition.basis(n)).all()


def test_sums_of_limbs_are_exact_in_float32():
    """All partial sums of the tables' limbs and any operand of 18 bits are below 2^24."""
    for n in range(1, 65):
        b = definition.basis(n)
        high = np.abs(definition.nearest(b, 512))
        low = np.abs(b - 512 * definition.nearest(b, 512))
        for axis in (0, 1):
            assert (512 * high).sum(axis).max() <= 2**24
            assert (512 * low + 256 * high).sum(axis).max() <= 2**24


def test_the_hash_knows_the_tables():
    assert definition_hash([64, 64, 1]) == definition_hash([1, 64])
    assert definition_hash([64]) != definition_hash([63])
