"""Apply, look-ahead and subtract for every chunk shape, dtype and number of peers, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from psyche_fast.kernels.apply import apply, lookahead, subtract
from psyche_fast.kernels.plan import Entries
from psyche_fast.kernels.triton.launch import planned
from tests.kernels import support
from tests.kernels.support import (
    CLASSES,
    PLACES,
    Guarded,
    check_guards,
    check_steps,
    directions_of,
    f64,
    guard,
    guarded_allocations,
    one_class,
)


def rates_of(shapes):
    return [0.01 * (1 + i) for i in range(len(shapes))]


def entries_of(plan, peers, generator, device, *, signs=False, scale=1.0, within=None):
    """`peers` results side by side, with repeated indices inside and between them."""
    size = (plan.chunks, peers * plan.k)
    indices = torch.randint(0, within or plan.totalk, size, generator=generator)
    values = (scale * torch.randn(size, generator=generator)).to(plan.dtype)
    return Entries(
        indices.to(device, plan.index_dtype), (values < 0 if signs else values).to(device)
    )


def scratch_is_zero(plan):
    """What kernels count and add up in must be left as it was found."""
    kept = planned(plan)._scratch
    return all(not t.any() for (dtype, _), t in kept.items() if dtype == torch.int32)


def check(
    shapes,
    device,
    backend,
    *,
    peers=3,
    k=8,
    signs=True,
    ahead=True,
    shrink=False,
    dtype=torch.float32,
    delta_dtype=torch.float32,
    place="whole",
    chunk=64,
    seed=0,
    entries=None,
):
    """One step from random parameters; returns the share of doubtful elements."""
    generator = torch.Generator().manual_seed(seed)
    plan = one_class(shapes, k=k, device=device, dtype=dtype, chunk=chunk)
    if entries is None:
        entries = entries_of(plan, peers, generator, device, signs=signs)
    rates = rates_of(shapes)
    shrinks = [0.9 - 0.01 * i for i in range(len(shapes))] if shrink else None
    weights = [torch.randn(s, generator=generator).to(dtype) for s in shapes]
    guards, parameters = guard(weights, place, device=device)
    state = torch.randn(plan.chunks, plan.h, plan.w, generator=generator)
    state.view(-1)[:: plan.w + 1] = 0  # whose sign is zero
    delta = Guarded(state, device=device, dtype=delta_dtype)
    copy_guards, copies = guard([torch.zeros_like(w) for w in weights], "odd", device=device)
    before = [p.clone() for p in parameters]
    with guarded_allocations():
        apply(
            plan,
            parameters,
            entries,
            rates,
            shrinks=shrinks,
            ahead=copies if ahead else None,
            delta=delta.tensor if ahead else None,
            backend=backend,
        )
        if backend != "torch":
            assert scratch_is_zero(plan)
    check_guards(guards, copy_guards, [delta])
    assert torch.equal(delta.tensor.cpu(), state.to(delta_dtype))
    directions, doubts = directions_of(plan, entries, shapes, chunk)
    pieces = np.split(np.sign(f64(delta.tensor)), starts_of(plan)[1:])
    steps = [support.from_chunks(p, s, chunk) for p, s in zip(pieces, shapes, strict=True)]
    check_steps(parameters, before, directions, rates, shrinks, doubts)
    if ahead:
        check_steps(copies, parameters, steps, rates)
    return sum(d.sum() for d in doubts) / sum(d.size for d in doubts)


def starts_of(plan):
    return [member.start for member in plan.members]


# Values that are numbers differ from signs in how they are read: once for each kernel.
@pytest.mark.parametrize(
    ("name", "signs"),
    [(name, True) for name in CLASSES]
    + [(name, False) for name in ("64x64", "22x38", "1x64", "64x1")],
)
def test_chunk_shapes(name, signs, device, backend):
    doubtful = check(CLASSES[name], device, backend, signs=signs)
    assert doubtful < (0.3 if name == "3x5" else 0.02)  # signs of 15 coefficients cancel in places


@pytest.mark.parametrize(("ahead", "shrink"), [(False, True), (True, True)])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("64x64", dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    + [("22x38", torch.bfloat16), ("1x64", torch.bfloat16), ("64x1", torch.float16)],
)
def test_kinds_of_look_ahead(name, dtype, ahead, shrink, device, backend):
    options = {"dtype": dtype, "ahead": ahead, "shrink": shrink}
    delta_dtype = torch.float32 if dtype == torch.float16 else dtype
    check(CLASSES[name], device, backend, delta_dtype=delta_dtype, **options)


# Whole ones are everywhere else here. Rows and columns keep the alignment of those that have one.
@pytest.mark.parametrize(
    ("name", "place"),
    [(name, place) for name in ("64x64", "experts", "1x64") for place in ("rows", "columns", "odd")]
    + [(name, "odd") for name in ("50x50", "64x1", "1x50")],
)
def test_places_in_bigger_tensors(name, place, device, backend):
    check(CLASSES[name], device, backend, place=place, k=3)


@pytest.mark.parametrize(
    ("shape", "peers", "k", "signs"),
    [
        ((64, 64), 1, 1, True),
        ((64, 64), 1, 4096, True),
        ((64, 64), 64, 16, True),  # as many entries as are handled in one pass
        ((64, 64), 205, 5, True),  # one more
        ((64, 64), 205, 5, False),
        ((64, 64), 256, 64, True),
        ((50, 50), 256, 8, False),
        ((3, 5), 256, 15, True),
        ((128,), 256, 4, True),
        ((128,), 256, 4, False),
        ((64, 3), 16, 8, True),
        ((67,), 256, 1, False),
    ],
)
def test_numbers_of_peers(shape, peers, k, signs, device, backend):
    # Entries are many, so that most coefficients are means of several.
    check([shape], device, backend, peers=peers, k=k, signs=signs)


@pytest.mark.parametrize(
    ("name", "peers"), [("64x64", 4), ("64x64", 130), ("22x38", 40), ("1x64", 5), ("64x1", 5)]
)
def test_order_of_entries_does_not_matter(name, peers, device, backend):
    """To the bit, for signs and floats, in apply and in subtract."""
    shapes = CLASSES[name]
    plan = one_class(shapes, k=8, device=device)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(s, generator=generator).to(device) for s in shapes]
    state = torch.randn(plan.chunks, plan.h, plan.w, generator=generator).to(device)
    for signs in (True, False):
        entries = entries_of(plan, peers, generator, device, signs=signs, within=plan.totalk // 4)
        outcomes = []
        for order in (torch.arange(peers * 8), torch.randperm(peers * 8, generator=generator)):
            order = order.to(device)
            shuffled = Entries(
                entries.indices.to(torch.int32)[:, order].to(plan.index_dtype),
                entries.values[:, order],
            )
            parameters, delta = [w.clone() for w in weights], state.clone()
            apply(plan, parameters, shuffled, rates_of(shapes), backend=backend)
            subtract(plan, delta, shuffled, backend=backend)
            outcomes.append([*parameters, delta])
        assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


@pytest.mark.parametrize(
    ("name", "peers", "dtype"),
    [
        ("64x64", 130, torch.float32),
        ("50x50", 6, torch.bfloat16),
        ("1x64", 2, torch.bfloat16),
        ("1x64", 20, torch.float32),
        ("64x1", 6, torch.float32),
        ("1x1", 2, torch.bfloat16),
        ("1x1", 20, torch.float32),
    ],
)
def test_peers_that_cancel_change_nothing(name, dtype, peers, device, backend):
    shapes = CLASSES[name]
    plan = one_class(shapes, k=3, device=device, dtype=dtype)
    generator = torch.Generator().manual_seed(2)
    half = entries_of(plan, peers // 2, generator, device)
    for values, opposite in ((half.values, -half.values), (half.values < 0, half.values >= 0)):
        entries = Entries(
            torch.cat([half.indices.int(), half.indices.int()], 1).to(plan.index_dtype),
            torch.cat([values, opposite], 1),
        )
        parameters = [torch.randn(s, generator=generator).to(device, dtype) for s in shapes]
        before = [p.clone() for p in parameters]
        delta = torch.randn(plan.chunks, plan.h, plan.w, generator=generator).to(device)
        state = delta.clone()
        apply(plan, parameters, entries, rates_of(shapes), backend=backend)
        subtract(plan, delta, entries, backend=backend)
        assert all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))
        assert torch.equal(delta, state)


@pytest.mark.parametrize("shrink", [False, True])
@pytest.mark.parametrize("name", ["64x64", "1x64"])
def test_no_peers(name, shrink, device, backend):
    """Nothing to decode: weights decay, and the look-ahead is of the state."""
    plan = one_class(CLASSES[name], k=8, device=device)
    none = Entries(
        torch.empty(plan.chunks, 0, dtype=plan.index_dtype, device=device),
        torch.empty(plan.chunks, 0, device=device),
    )
    check(CLASSES[name], device, backend, entries=none, shrink=shrink)
    delta = torch.ones(plan.chunks, plan.h, plan.w, device=device)
    subtract(plan, delta, none, backend=backend)
    assert (delta == 1).all()


@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e10, 1e35])
@pytest.mark.parametrize(("shape", "peers"), [((64, 64), 3), ((64, 64), 200), ((128,), 3)])
def test_magnitudes_of_values(shape, peers, scale, device, backend):
    plan = one_class([shape], k=8, device=device)
    generator = torch.Generator().manual_seed(3)
    values = scale * torch.randint(1, 8, (plan.chunks, peers * 8), generator=generator)
    indices = torch.randint(0, plan.totalk, values.shape, generator=generator)
    if device.type == "cuda":
        values = torch.where(values.abs() < support.TINY, 0.0, values)  # which a GPU may flush
    entries = Entries(indices.to(device, plan.index_dtype), values.to(device))
    if scale > 1e-40:  # smaller ones have too few bits left
        check([shape], device, backend, entries=entries)
    delta = torch.zeros(plan.chunks, plan.h, plan.w, device=device)
    subtract(plan, delta, entries, backend=backend)
    exact, size = support.decoded(entries, plan)
    error = support.largest_of(f64(delta) + exact)
    assert (error <= support.TOLERANCE * size + support.TINY).all()


@pytest.mark.parametrize("shape", [(64, 64), (50, 50), (128,)])
def test_small_values_beside_large_ones(shape, device, backend):
    """What is under the fixed point of the largest value counts as zero, and does no harm."""
    plan = one_class([shape], k=4, device=device)
    generator = torch.Generator().manual_seed(4)
    values = 10.0 ** torch.linspace(-38, 30, plan.chunks * 16).view(plan.chunks, 16)
    indices = torch.stack(
        [torch.randperm(plan.totalk, generator=generator)[:16] for _ in range(plan.chunks)]
    )
    entries = Entries(indices.to(device, plan.index_dtype), values.to(device))
    check([shape], device, backend, entries=entries)


@pytest.mark.parametrize(
    ("name", "peers", "dtype"),
    [(*case, torch.float32) for case in (("64x64", 1), ("64x64", 150), ("22x38", 20), ("3x5", 150))]
    + [("1x1", 3, torch.float32), ("64x1", 5, torch.float32), ("1x64", 1, torch.bfloat16)]
    + [("64x64", 3, torch.bfloat16), ("22x38", 1, torch.bfloat16)],
)
def test_subtract(name, peers, dtype, device, backend):
    plan = one_class(CLASSES[name], k=8, device=device, dtype=dtype)
    generator = torch.Generator().manual_seed(5)
    state = torch.randn(plan.chunks, plan.h, plan.w, generator=generator)
    for signs in (True, False):
        entries = entries_of(plan, peers, generator, device, signs=signs)
        delta = Guarded(state, device=device, dtype=dtype)
        reference = delta.tensor.clone()
        sent, size = support.decoded(entries, plan)
        exact = f64(delta.tensor) - sent
        with guarded_allocations():
            subtract(plan, delta.tensor, entries, backend=backend)
            assert scratch_is_zero(plan)
        subtract(plan, reference, entries, backend="torch")
        delta.check()
        support.check_state(delta.tensor, reference, exact, size)


@pytest.mark.parametrize(
    ("name", "dtype", "place"),
    [(name, torch.bfloat16, "odd") for name in ("64x64", "22x38", "experts", "64x1", "1x1")]
    + [
        (name, *case)
        for name in ("64x64", "22x38", "1x64", "64x1")  # one for each kernel
        for case in ((torch.float32, "whole"), (torch.float16, "columns"))
    ],
)
def test_lookahead(name, dtype, place, device, backend):
    shapes = CLASSES[name]
    plan = one_class(shapes, k=1, device=device, dtype=dtype)
    generator = torch.Generator().manual_seed(6)
    state = torch.randn(plan.chunks, plan.h, plan.w, generator=generator)
    state.view(-1)[::5] = 0
    state.view(-1)[1::5] *= -0.0
    delta_dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    delta = Guarded(state, device=device, dtype=delta_dtype)
    weights = [torch.randn(s, generator=generator) for s in shapes]
    guards, parameters = guard(weights, place, device=device, dtype=dtype)
    copy_guards, copies = guard(weights, "columns", device=device, dtype=dtype)
    before = [p.clone() for p in parameters]
    rates = rates_of(shapes)
    with guarded_allocations():
        lookahead(plan, parameters, delta.tensor, rates, copies, backend=backend)
    check_guards(guards, copy_guards, [delta])
    pieces = np.split(np.sign(f64(delta.tensor)), starts_of(plan)[1:])
    steps = [support.from_chunks(p, s) for p, s in zip(pieces, shapes, strict=True)]
    check_steps(copies, before, steps, rates)
    assert all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))


@pytest.mark.parametrize("name", ["64x64", "1x64"])
def test_rates_as_tensors_are_rates_as_numbers(name, device, backend):
    shapes = CLASSES[name]
    plan = one_class(shapes, k=4, device=device)
    generator = torch.Generator().manual_seed(7)
    entries = entries_of(plan, 3, generator, device)
    weights = [torch.randn(s, generator=generator).to(device) for s in shapes]
    several = rates_of(shapes)
    outcomes = []
    for rates in (several, torch.tensor(several, device=device)):
        parameters = [w.clone() for w in weights]
        apply(plan, parameters, entries, rates, shrinks=rates, backend=backend)
        outcomes.append(parameters)
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


def test_empty_members(device, backend):
    shapes = [(0, 64), (1, 64), (2, 0, 64), (1, 128), (0, 64)]
    check(shapes, device, backend)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    chunk=st.sampled_from([8, 16, 64]),
    lead=st.sampled_from([(), (2,), (1, 2)]),
    sides=st.tuples(st.integers(1, 48), st.integers(1, 70)),
    peers=st.integers(1, 20),
    k=st.integers(1, 40),
    signs=st.booleans(),
    ahead=st.sampled_from(["no", "copy", "in place"]),
    place=st.sampled_from(PLACES),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_any_shape(device, backend, chunk, lead, sides, place, dtype, **options):
    sides = [min(side, 3 * chunk) for side in sides]
    shape = (*lead, *sides)
    check([shape], device, backend, place=place, dtype=dtype, chunk=chunk, **options)
