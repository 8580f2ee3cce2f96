"""Chunks with one dimension: what many of them in one tile, of several parameters, must not mix."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from psyche_fast.kernels.apply import apply, subtract
from psyche_fast.kernels.encode import encode
from psyche_fast.kernels.plan import Entries
from psyche_fast.kernels.triton.launch import ROWS_PER_TILE, planned
from tests.kernels import support
from tests.kernels.support import (
    Guarded,
    check_guards,
    check_selection,
    check_state,
    check_steps,
    directions_of,
    exact_state,
    f64,
    guard,
    guarded_allocations,
    one_class,
)

DECAY = 0.9


def shape_of(kind, chunks, length):
    """A parameter of so many chunks `1 x length` or, strided, `length x 1`."""
    if kind == "vector":
        return (chunks * length,)
    return (chunks, length) if kind == "rows" else (length, chunks)


def check(shapes, k, device, backend, *, chunk, place="whole", missing=(), seed=0, peers=2):
    """One step of all operations with a rate of its own for every member."""
    generator = torch.Generator().manual_seed(seed)
    plan = one_class(shapes, k=k, device=device, chunk=chunk)
    assert plan.h == 1 or plan.w == 1
    rates = [0.01 * (1 + i) for i in range(len(shapes))]
    shrinks = [1 - 0.01 * (1 + i) for i in range(len(shapes))]
    state = torch.randn(plan.chunks, plan.h, plan.w, generator=generator)
    own = Entries(
        torch.stack(
            [torch.randperm(plan.totalk, generator=generator)[:k] for _ in range(plan.chunks)]
        )
        .sort(dim=1)
        .values.to(device, plan.index_dtype),
        torch.randn(plan.chunks, plan.k, generator=generator).to(device),
        unique=True,
    )
    gradients = [
        None if i in missing else torch.randn(shape, generator=generator)
        for i, shape in enumerate(shapes)
    ]
    gradient_guards, gradients = guard(gradients, place, device=device)
    weights = [torch.randn(shape, generator=generator) for shape in shapes]
    guards, parameters = guard(weights, place, device=device)
    copy_guards, copies = guard(weights, "odd", device=device)
    delta = Guarded(state, device=device)
    reference = delta.tensor.clone()
    before = [p.clone() for p in parameters]
    options = {"decay": DECAY, "previous": own}
    with guarded_allocations():
        entries = encode(
            plan,
            delta.tensor,
            gradients,
            rates,
            backend=backend,
            **options,
        )
        received = Entries(
            torch.cat([entries.indices.int(), own.indices.int()] * peers, 1).to(plan.index_dtype),
            torch.cat([entries.values, own.values] * peers, 1),
        )
        apply(
            plan,
            parameters,
            received,
            rates,
            shrinks=shrinks,
            ahead=copies,
            delta=delta.tensor,
            backend=backend,
        )
        assert all(not t.any() for t in planned(plan)._scratch.values())
    check_guards(gradient_guards, guards, copy_guards, [delta])
    encode(plan, reference, gradients, rates, backend="torch", **options)
    exact = exact_state(f64(state), gradients, shapes, rates, DECAY, 1.0, own, chunk)
    check_state(delta.tensor, reference, exact, support.decoded(own, plan)[1])
    check_selection(plan, entries, delta.tensor)
    ends = [m.start for m in plan.members][1:]

    def of_members(chunks):
        pieces = np.split(np.sign(f64(chunks)), ends)
        return [support.from_chunks(p, s, chunk) for p, s in zip(pieces, shapes, strict=True)]

    directions, doubts = directions_of(plan, received, shapes, chunk)
    check_steps(parameters, before, directions, rates, shrinks, doubts)
    check_steps(copies, parameters, of_members(delta.tensor), rates)


@pytest.mark.parametrize(
    ("kind", "k", "chunks"),
    [("vector", 3, n) for n in (1, 64, 2 * ROWS_PER_TILE + 1)]
    + [("vector", 8, 65), ("columns", 3, 1), ("columns", 3, 129)],
)
def test_tiles_that_are_not_full(kind, k, chunks, device, backend):
    shapes = [(chunks * 8,)] if kind == "vector" else [(8, 1)] * chunks
    check(shapes, k, device, backend, chunk=8)


@pytest.mark.parametrize(
    ("place", "missing"), [("whole", ()), ("rows", (1,)), ("columns", (0, 3)), ("odd", (0, 3))]
)
def test_parameters_that_share_a_tile(missing, place, device, backend):
    shapes = [(24,), (11, 16), (8,), (2, 13, 8), (1, 8), (64,)]
    check(shapes, 3, device, backend, chunk=8, missing=missing, place=place)


@pytest.mark.parametrize(("place", "missing"), [("whole", ()), ("columns", (1,)), ("odd", (1,))])
def test_columns_that_share_a_tile(missing, place, device, backend):
    shapes = [(16, 11), (8, 1), (2, 8, 13)]
    check(shapes, 3, device, backend, chunk=8, missing=missing, place=place)


@pytest.mark.parametrize("shapes", [[(), (1,), (11, 13), (17,)], [(1, 1), ()]])
def test_chunks_of_one_element(shapes, device, backend):
    check(shapes, 1, device, backend, chunk=8)


@settings(max_examples=4, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(["vector", "rows", "columns"]),
    length=st.integers(2, 64),
    chunks=st.lists(st.sampled_from([1, 67, 71, 2, 3]), min_size=1, max_size=3),
    k=st.integers(1, 64),
    place=st.sampled_from(support.PLACES),
    seed=st.integers(0, 1000),
)
def test_any_length(device, backend, kind, length, chunks, k, place, seed):
    # A matrix of `n` rows has chunks of height 1 where `n` is a prime over the target, or 1.
    if kind != "vector":
        chunks = [n if n in (1, 67, 71) else 67 for n in chunks]
    shapes = [shape_of(kind, n, length) for n in chunks]
    check(shapes, min(k, length), device, backend, chunk=length, place=place, seed=seed)


def test_place_in_a_tile_does_not_matter(device, backend):
    """To the bit: a chunk's results are the same wherever in the class it lies."""
    generator = torch.Generator().manual_seed(1)
    many, few = one_class([(97 * 64,)], k=8, device=device), one_class([(64,)], k=8, device=device)
    state = torch.randn(1, 1, 64, generator=generator).to(device)
    weight = torch.randn(64, generator=generator).to(device)
    outcomes = []
    for plan in (many, few):
        delta, parameter = state.repeat(plan.chunks, 1, 1), weight.repeat(plan.chunks)
        entries = encode(plan, delta, [parameter], [0.1], decay=DECAY, backend=backend)
        apply(plan, [parameter], entries, [0.1], backend=backend)
        subtract(plan, delta, entries, backend=backend)
        outcomes.append((entries.indices.int(), entries.values, delta, parameter.view(-1, 64)))
    for of_many, of_few in zip(*outcomes, strict=True):
        assert torch.equal(of_many, of_few.expand_as(of_many))
