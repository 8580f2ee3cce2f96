"""The reference operations against float64, and what they promise about bits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from psyche_fast.kernels.apply import apply, lookahead, subtract
from psyche_fast.kernels.encode import encode
from psyche_fast.kernels.plan import Entries, cut_slices
from tests.kernels.support import (
    CLASSES,
    decoded,
    exact_state,
    f64,
    from_chunks,
    largest,
    numbers,
    one_class,
    transform,
)

CPU = torch.device("cpu")
DECAY = 0.97
TIGHT = 1e-12


def tensors(shapes, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def case(name, k=5, dtype=torch.float64, seed=0):
    """A class's shapes, plan and state."""
    shapes = CLASSES[name]
    plan = one_class(shapes, k=k, device=CPU, dtype=dtype)
    (delta,) = tensors([(plan.chunks, plan.h, plan.w)], seed, plan.compute_dtype)
    return shapes, plan, delta


def rates_of(shapes):
    return [0.01 * (1 + i) for i in range(len(shapes))]


def sent(plan, seed, repeated=False):
    """Entries with distinct indices, or with some that occur twice."""
    generator = np.random.default_rng(seed)
    rows = [generator.permutation(plan.totalk)[: plan.k] for _ in range(plan.chunks)]
    indices = torch.tensor(np.array(rows))
    if repeated:
        indices[:, 0] = indices[:, -1]
    values = torch.tensor(generator.standard_normal(indices.shape)).to(plan.dtype)
    return Entries(indices.to(plan.index_dtype), values, unique=not repeated)


def check_entries(plan, entries, state):
    """Entries against the coefficients of a float64 state."""
    exact = transform(f64(state))
    indices, values = numbers(entries)
    np.testing.assert_array_equal(indices, largest(exact, plan.k))
    np.testing.assert_allclose(values, np.take_along_axis(exact, indices, 1), atol=TIGHT)
    assert entries.unique


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("before", ["none", "few", "many", "repeated"])
def test_encode_follows_float64(name, before):
    """Few entries are decoded as outer products, many through a dense chunk."""
    shapes, plan, delta = case(
        name, k=min(40, math.prod(CLASSES[name][0])) if before == "many" else 3
    )
    previous = None if before == "none" else sent(plan, 1, before == "repeated" and plan.k > 1)
    gradients = [None if i == 1 else g for i, g in enumerate(tensors(shapes, 2))]
    rates = rates_of(shapes)
    exact = exact_state(f64(delta), gradients, shapes, rates, DECAY, 0.5, previous)
    entries = encode(
        plan, delta, gradients, rates, decay=DECAY, gradient_scale=0.5, previous=previous
    )
    np.testing.assert_allclose(f64(delta), exact, atol=TIGHT)
    check_entries(plan, entries, delta)


@pytest.mark.parametrize("name", ["64x64", "53x64", "experts", "1x64", "64x1"])
@pytest.mark.parametrize("k", [3, 40])
def test_subtracting_in_advance_ends_in_the_same_bits(name, k):
    outcomes = []
    for in_advance in (False, True):
        shapes, plan, delta = case(name, k, torch.float32)
        previous = sent(plan, 1)
        if in_advance:
            subtract(plan, delta, previous)
            previous = Entries(previous.indices, torch.zeros_like(previous.values), unique=True)
        options = {"decay": DECAY, "previous": previous}
        gradients = tensors(shapes, 2, torch.float32)
        outcomes.append((encode(plan, delta, gradients, rates_of(shapes), **options), delta))
    (first, state), (second, other) = outcomes
    assert torch.equal(state, other)
    assert torch.equal(first.indices, second.indices)
    assert torch.equal(first.values, second.values)


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("scale", [0.25, math.nan, math.inf, -math.inf])
def test_a_scale_that_is_not_finite_leaves_the_gradients_out(scale, as_tensor, device):
    shapes = CLASSES["1x64"]
    plan = one_class(shapes, k=5, device=device)
    gradients = [g.to(device) for g in tensors(shapes, 2, torch.float32)]
    if not math.isfinite(scale):
        gradients[0][0] = math.nan
    start = torch.randn(plan.chunks, plan.h, plan.w, generator=torch.Generator().manual_seed(0))
    deltas = [start.clone().to(device) for _ in range(2)]
    without = [None] * len(shapes) if not math.isfinite(scale) else [g * scale for g in gradients]
    given = torch.tensor(scale, device=device) if as_tensor else scale
    rates = rates_of(shapes)
    entries = encode(plan, deltas[0], gradients, rates, decay=0.9, gradient_scale=given)
    expected = encode(plan, deltas[1], without, rates, decay=0.9)
    torch.testing.assert_close(deltas[0], deltas[1], atol=1e-7, rtol=0)
    assert torch.equal(entries.indices, expected.indices)


@pytest.mark.parametrize("one", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rates_as_tensors_are_rates_as_numbers(one, dtype, device):
    shapes = CLASSES["64x64"]
    plan = one_class(shapes, k=5, device=device, dtype=dtype)
    rates = [0.25] * len(shapes) if one else [0.25, 0.5]
    tensor = torch.tensor(0.25 if one else rates, device=device)
    outcomes = []
    for lrs in (rates, tensor):
        parameters = [p.to(device) for p in tensors(shapes, 1, dtype)]
        ahead = [torch.empty_like(p) for p in parameters]
        gradients = [g.to(device) for g in tensors(shapes, 2, dtype)]
        delta = torch.ones(plan.chunks, plan.h, plan.w, device=device)
        entries = encode(plan, delta, gradients, lrs, decay=0.5)
        apply(plan, parameters, entries, lrs, shrinks=lrs, ahead=ahead, delta=delta)
        lookahead(plan, parameters, delta, lrs, gradients)
        outcomes.append([*parameters, *ahead, *gradients, delta, entries.indices, entries.values])
    for ours, theirs in zip(*outcomes, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("k", [3, 40])
@pytest.mark.parametrize("kind", ["unique", "repeated", "signs"])
def test_apply_follows_float64(name, k, kind):
    shapes, plan, delta = case(name, k)
    entries = sent(plan, 1, kind == "repeated" and plan.k > 1)
    if kind == "signs":
        entries = Entries(entries.indices, entries.values < 0)
    before, rates = tensors(shapes, 3), rates_of(shapes)
    for shrinks, wanted in (
        (None, [1.0] * len(shapes)),
        ([0.5, 0.9, 0.7, 0.8], [0.5, 0.9, 0.7, 0.8]),
    ):
        parameters = [p.clone() for p in before]
        ahead = [torch.full_like(p, math.nan) for p in before]
        options = {"shrinks": shrinks and shrinks[: len(shapes)], "ahead": ahead, "delta": delta}
        apply(plan, parameters, entries, rates, **options)
        dense, _ = decoded(entries, plan)
        start = 0
        for i, (p, was) in enumerate(zip(parameters, before, strict=True)):
            stop = start + plan.members[i].count
            update = from_chunks(dense[start:stop], shapes[i])
            sure = np.abs(update) > 1e-5  # the definition's own error: 18 bits
            assert sure.mean() > 0.8
            exact = wanted[i] * was.numpy() - rates[i] * np.sign(update)
            np.testing.assert_allclose(p.numpy()[sure], exact[sure], atol=TIGHT)
            away = np.sign(from_chunks(delta.numpy()[start:stop], shapes[i]))
            np.testing.assert_allclose(ahead[i].numpy(), p.numpy() - rates[i] * away, atol=TIGHT)
            start = stop


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype):
    """Parameters are worked on in float32: `1 + 2^-8` and the like would be lost on the way."""
    plan = one_class([(64,)], k=1, device=CPU, dtype=dtype)
    parameter = torch.full((64,), 1.0, dtype=dtype)
    entries = Entries(torch.zeros(1, 1, dtype=torch.uint8), torch.ones(1, 1, dtype=dtype))
    rate, shrink = 2.0**-12, 1 - 2.0**-12
    apply(plan, [parameter], entries, [rate], shrinks=[shrink])
    wanted = (torch.tensor(1.0) * shrink - rate).to(dtype)
    assert torch.equal(parameter, wanted.expand(64))
    several = torch.full((64,), 1.0, dtype=dtype)
    for _ in range(2):
        lookahead(plan, [several], torch.ones(1, 1, 64), [rate], [parameter])
        assert torch.equal(parameter, (torch.tensor(1.0) - rate).to(dtype).expand(64))


@pytest.mark.parametrize("name", ["64x64", "experts", "1x64", "64x1"])
@pytest.mark.parametrize("group", [1, 3, 1000])
def test_slices_and_groups_change_no_selection(name, group, monkeypatch):
    """Chunks worked on one or three at a time, and parameters that fall into several slices."""
    shapes, whole, delta = case(name, 5, torch.float32)
    gradients = tensors(shapes, 2, torch.float32)
    outcomes = []
    for limit in (1 << 20, 1, 3):
        if limit < 1 << 20:
            monkeypatch.setattr(
                "psyche_fast.kernels.reference.workspace._GROUP_ELEMENTS", group * whole.totalk
            )
        plan = one_class(shapes, k=5, device=CPU)
        slices = cut_slices(plan.members, plan.totalk, limit * plan.totalk)
        object.__setattr__(plan, "slices", slices)
        assert max(s.stop - s.start for s in slices) <= limit
        state = delta.clone()
        parameters = tensors(shapes, 3, torch.float32)
        previous, entries = sent(plan, 1), None
        options = {"decay": DECAY, "previous": previous}
        entries = encode(plan, state, gradients, rates_of(shapes), **options)
        apply(plan, parameters, entries, rates_of(shapes))
        outcomes.append((state, entries, parameters))
    state, entries, parameters = outcomes[0]
    for other, theirs, moved in outcomes[1:]:
        torch.testing.assert_close(other, state, atol=1e-6, rtol=0)
        assert torch.equal(entries.indices, theirs.indices)
        torch.testing.assert_close(theirs.values, entries.values, atol=1e-5, rtol=0)
        for p, q in zip(parameters, moved, strict=True):
            torch.testing.assert_close(p, q, atol=0, rtol=0)


def test_the_same_call_gives_the_same_bits():
    outcomes = []
    for _ in range(2):
        shapes, plan, delta = case("64x64", 40, torch.float32)
        parameters = tensors(shapes, 3, torch.float32)
        both = [sent(plan, seed) for seed in (1, 2)]
        entries = Entries(
            *(torch.cat([getattr(e, n) for e in both], 1) for n in ("indices", "values"))
        )
        own = encode(plan, delta, tensors(shapes, 2, torch.float32), [0.1, 0.2], decay=DECAY)
        apply(plan, parameters, entries, [0.1, 0.2])
        outcomes.append([delta, own.indices, own.values, *parameters])
    for first, second in zip(*outcomes, strict=True):
        assert torch.equal(first, second)
