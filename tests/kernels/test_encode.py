"""Encode of every chunk shape, dtype and number of entries, against float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from psyche_fast.kernels.encode import encode
from psyche_fast.kernels.plan import Entries
from tests.kernels import support
from tests.kernels.support import (
    CLASSES,
    PLACES,
    Guarded,
    check_guards,
    check_selection,
    check_state,
    exact_state,
    f64,
    guard,
    one_class,
    run_encode,
)

DECAY = 0.97


def random(shapes, generator, scale=1.0):
    return [scale * torch.randn(shape, generator=generator) for shape in shapes]


def rates_of(shapes):
    """A rate of its own for every member."""
    return [0.01 * (1 + i) for i in range(len(shapes))]


def check(
    shapes,
    device,
    backend,
    *,
    k=8,
    dtype=torch.float32,
    gradient_dtype=torch.float32,
    delta_dtype=torch.float32,
    place="whole",
    chunk=64,
    seed=0,
    scale=0.5,
):
    """A step that takes out random entries of the step before; returns the agreement."""
    generator = torch.Generator().manual_seed(seed)
    plan = one_class(shapes, k=k, device=device, dtype=dtype, chunk=chunk)
    rates = rates_of(shapes)
    start = 0.02 * torch.randn(plan.chunks, plan.h, plan.w, generator=generator)
    delta = Guarded(start, device=device, dtype=delta_dtype)
    reference = delta.tensor.clone()
    order = torch.rand(plan.chunks, plan.totalk, generator=generator).argsort(dim=1)
    previous = Entries(
        order[:, : plan.k].sort(dim=1).values.to(device, plan.index_dtype),
        (0.1 * torch.randn(plan.chunks, plan.k, generator=generator)).to(device, dtype),
        unique=True,
    )
    guards, gradients = guard(random(shapes, generator), place, device=device, dtype=gradient_dtype)
    exact = exact_state(f64(delta.tensor), gradients, shapes, rates, DECAY, scale, previous, chunk)
    options = {
        "decay": DECAY,
        "gradient_scale": torch.tensor(scale, device=device),
        "previous": previous,
    }
    encode(plan, reference, gradients, rates, backend="torch", **options)
    entries = run_encode(plan, delta.tensor, gradients, rates, backend=backend, **options)
    check_guards([delta], guards)
    check_state(delta.tensor, reference, exact, support.decoded(previous, plan)[1])
    return check_selection(plan, entries, delta.tensor)


@pytest.mark.parametrize("name", CLASSES)
def test_chunk_shapes(name, device, backend):
    assert check(CLASSES[name], device, backend) > 0.99


# Whole ones are everywhere else here. Rows and columns keep the alignment of those that have one.
@pytest.mark.parametrize(
    ("name", "place"),
    [(name, place) for name in ("64x64", "experts", "1x64") for place in ("rows", "columns", "odd")]
    + [(name, "odd") for name in ("50x50", "64x1", "1x50")],
)
def test_places_in_bigger_tensors(name, place, device, backend):
    check(CLASSES[name], device, backend, place=place, k=3)


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


# The kernel for rows reads as that for tiles does, and its columns as its rows.
@pytest.mark.parametrize(
    ("name", "dtype", "gradient_dtype", "delta_dtype"),
    [
        ("64x64", BF16, BF16, BF16),
        ("64x64", BF16, FP32, FP32),
        ("64x64", BF16, FP32, BF16),
        ("64x64", FP32, BF16, FP32),
        ("64x64", FP32, FP32, BF16),
        ("64x64", FP16, FP16, FP32),
        ("1x64", BF16, BF16, BF16),
        ("1x64", BF16, FP32, FP32),
        ("1x64", FP16, FP16, FP32),
        ("64x1", FP32, BF16, BF16),
    ],
)
def test_dtypes(name, dtype, gradient_dtype, delta_dtype, device, backend):
    check(
        CLASSES[name][:1],
        device,
        backend,
        dtype=dtype,
        gradient_dtype=gradient_dtype,
        delta_dtype=delta_dtype,
    )


# One; several; the most that are taken in rounds, the least by a threshold; all but one; all.
@pytest.mark.parametrize(
    ("shape", "k"),
    [((64, 64), k) for k in (1, 17, 64, 65, 4096)]
    + [
        ((22, 38), 65),
        ((22, 38), 836),
        ((2, 64), 127),
        ((3, 5), 14),
        ((3, 5), 15),
    ]
    + [((64, 1), 1), ((64, 1), 64), ((128,), 33), ((128,), 63)],
)
def test_numbers_of_entries(shape, k, device, backend):
    check([shape], device, backend, k=k)


@st.composite
def shapes(draw):
    """A target and a shape of few chunks, if large ones."""
    chunk = draw(st.sampled_from([8, 16, 64]))
    side = st.integers(1, 3 * chunk if chunk < 64 else 70)
    lead = draw(st.sampled_from([(), (2,), (1, 2), (2, 1)]))
    return chunk, (*lead, draw(side), draw(side))


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    shape=shapes(),
    k=st.integers(1, 80),
    place=st.sampled_from(PLACES),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    delta_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_any_shape(device, backend, shape, k, place, dtype, delta_dtype, seed):
    check(
        [shape[1]],
        device,
        backend,
        k=k,
        dtype=dtype,
        delta_dtype=delta_dtype,
        place=place,
        chunk=shape[0],
        seed=seed,
    )


def encoded(plan, state, device, backend, **options):
    """Entries of a state that nothing is added to, and the state afterwards."""
    delta = Guarded(state, device=device)
    entries = run_encode(
        plan,
        delta.tensor,
        [None] * len(plan.members),
        [0.0] * len(plan.members),
        decay=1.0,
        backend=backend,
        **options,
    )
    delta.check()
    return entries, delta.tensor


def inverse_of(coefficients, h, w):
    """A state whose coefficients are these, `[chunks, h, w]`."""
    exact = support.untransform(coefficients.numpy().astype(np.float64), h, w)
    return torch.from_numpy(exact).float()


@pytest.mark.parametrize(
    ("shape", "k"),  # by rounds up to 64, by a threshold above
    [((64, 64), 64), ((50, 50), 65), ((2, 64), 64), ((2, 64), 65), ((192,), 64), ((64, 2), 64)],
)
def test_zeros_take_the_lowest_indices(shape, k, device, backend):
    plan = one_class([shape], k=k, device=device, chunk=64)
    entries, state = encoded(plan, torch.zeros(plan.chunks, plan.h, plan.w), device, backend)
    expected = torch.arange(plan.k).expand(plan.chunks, plan.k)
    assert torch.equal(entries.indices.cpu().int(), expected.int())
    assert not entries.values.any()
    assert not state.any()


@pytest.mark.parametrize("k", [3, 20, 70])
@pytest.mark.parametrize("h", [1, 16])
def test_ties_take_the_lowest_indices(h, k, device, backend):
    """Coefficients are those of a 16 x 16 chunk of one value: exact ones, and exact zeros."""
    w = 16
    plan = one_class([(h, 4 * w) if h > 1 else (4 * w,)], k=k, device=device, chunk=16)
    # One constant row, or one constant chunk: the first coefficient is alone, all others are zero
    # within rounding, whatever their sign; a chunk of zeros ties everywhere.
    state = torch.zeros(plan.chunks, h, w)
    state[1] = 1.0
    entries, after = encoded(plan, state, device, backend)
    indices, values = support.numbers(entries)
    for chunk in (0, 2, 3):
        assert (indices[chunk] == np.arange(plan.k)).all()
        assert (values[chunk] == 0).all()
    assert indices[1, 0] == 0
    assert values[1, 0] == pytest.approx(math.sqrt(h * w), rel=support.TOLERANCE)
    assert torch.equal(after.cpu(), state)


def test_equal_magnitudes_of_opposite_sign(device, backend):
    """A chunk with one element, and 1 x 2 chunks of (x, 0) and (0, x): coefficients `x/sqrt(2)`
    and plus or minus the same."""
    plan = one_class([(8,)], k=1, device=device, chunk=2)
    state = torch.tensor([[3.0, 0.0], [0.0, 3.0], [-3.0, 0.0], [0.0, -3.0]]).view(4, 1, 2)
    entries, _ = encoded(plan, state, device, backend)
    indices, values = support.numbers(entries)
    assert (indices == 0).all()
    root = 3 / math.sqrt(2)
    np.testing.assert_allclose(values[:, 0], [root, root, -root, -root], rtol=support.TOLERANCE)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_equal_magnitudes_in_several_rows(k, device, backend):
    """2 x 2 chunks with one element each: all four coefficients have the same magnitude."""
    plan = one_class([(2, 8)], k=k, device=device, chunk=2)
    state = torch.zeros(4, 4)
    state[range(4), range(4)] = torch.tensor([1.0, -1.0, 2.0, -0.5])
    entries, _ = encoded(plan, state.view(4, 2, 2), device, backend)
    indices, values = support.numbers(entries)
    exact = support.transform(state.view(4, 2, 2).double().numpy())
    assert (indices == np.arange(k)).all()
    np.testing.assert_allclose(values, exact[:, :k], rtol=support.TOLERANCE)


@pytest.mark.parametrize("magnitude", [1e-44, 1e-39, 3e-38, 1e-30, 1e30])
@pytest.mark.parametrize("shape", [(64, 64), (3, 5), (67,), (128,)])
def test_magnitudes(shape, magnitude, device, backend):
    plan = one_class([shape], k=4, device=device)
    generator = torch.Generator().manual_seed(1)
    state = magnitude * torch.randn(plan.chunks, plan.h, plan.w, generator=generator)
    entries, after = encoded(plan, state, device, backend)
    indices, values = support.numbers(entries)
    exact = support.transform(f64(after))
    error = support.TOLERANCE * np.abs(exact).max(1, keepdims=True) + support.TINY
    assert (np.diff(indices, axis=1) > 0).all()
    assert (np.abs(values - np.take_along_axis(exact, indices, 1)) <= error).all()
    assert np.isfinite(values).all()


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy's, in the interpreter
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("shape", "k"), [((64, 256), 8), ((64, 256), 70), ((50, 200), 8), ((256,), 8), ((256,), 64)]
)
def test_a_state_that_is_not_finite_spoils_its_own_chunk_only(shape, k, bad, device, backend):
    plan = one_class([shape], k=k, device=device)
    generator = torch.Generator().manual_seed(2)
    state = torch.randn(4, plan.h, plan.w, generator=generator)
    state[1, plan.h - 1, 3] = bad
    entries, after = encoded(plan, state, device, backend)
    indices, _ = support.numbers(entries)
    assert indices.min() >= 0
    assert indices.max() < plan.totalk
    assert (np.diff(indices, axis=1) > 0).all()
    sound = [0, 2, 3]
    alone = one_class([(*shape[:-1], shape[-1] // 4 * 3)], k=k, device=device)
    # Places of uint16 cannot be picked on a GPU.
    indices = entries.indices.int()[sound].to(plan.index_dtype)
    rest = Entries(indices, entries.values[sound], unique=True)
    check_selection(alone, rest, after[sound])


@pytest.mark.parametrize(
    ("name", "scale", "as_tensor"),
    [
        ("22x38", math.nan, True),
        ("22x38", math.inf, False),
        ("1x64", -math.inf, True),
        ("1x64", math.nan, True),
    ],
)
def test_scale_that_is_not_finite_leaves_gradients_out(name, as_tensor, scale, device, backend):
    shapes = CLASSES[name]
    plan = one_class(shapes, k=4, device=device)
    generator = torch.Generator().manual_seed(3)
    state = torch.randn(plan.chunks, plan.h, plan.w, generator=generator).to(device)
    gradients = [g.to(device) for g in random(shapes, generator)]
    gradients[0].view(-1)[0] = math.nan
    gradients[-1].view(-1)[-1] = math.inf
    results = []
    for given_gradients, factor in ((gradients, scale), ([None] * len(shapes), 1.0)):
        delta = state.clone()
        given_scale = torch.tensor(factor, device=device) if as_tensor else factor
        options = {"decay": 0.9, "gradient_scale": given_scale, "backend": backend}
        entries = encode(plan, delta, given_gradients, rates_of(shapes), **options)
        results.append((delta, entries.indices.int(), entries.values))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
    assert results[0][0].isfinite().all()


@pytest.mark.parametrize(
    ("shape", "missing"),
    [((64, 64), (0,)), ((64, 64), (0, 1, 2)), ((64,), (2,)), ((7, 1), (0,)), ((7, 1), (0, 1, 2))],
)
def test_gradients_of_none_and_parameters_without_elements(missing, shape, device, backend):
    shapes = [shape, shape, shape]
    plan = one_class(shapes, k=4, device=device)
    generator = torch.Generator().manual_seed(4)
    state = torch.randn(plan.chunks, plan.h, plan.w, generator=generator).to(device)
    gradients = [g.to(device) for g in random(shapes, generator)]
    partly = [None if i in missing else g for i, g in enumerate(gradients)]
    zeros = [torch.zeros_like(g) if i in missing else g for i, g in enumerate(gradients)]
    one, other = state.clone(), state.clone()
    for delta, given_gradients in ((one, partly), (other, zeros)):
        run_encode(plan, delta, given_gradients, rates_of(shapes), decay=DECAY, backend=backend)
    assert torch.equal(one, other)


@pytest.mark.parametrize("empty", [(0, 64), (2, 0, 64)])
def test_empty_members(empty, device, backend):
    shapes = [empty, (1, 64), empty, (1, 128)]
    plan = one_class(shapes, k=4, device=device)
    generator = torch.Generator().manual_seed(5)
    gradients = [g.to(device) for g in random(shapes, generator)]
    delta = torch.zeros(plan.chunks, plan.h, plan.w, device=device)
    rates = rates_of(shapes)
    entries = run_encode(plan, delta, gradients, rates, decay=DECAY, backend=backend)
    exact = exact_state(np.zeros(delta.shape), gradients, shapes, rates, DECAY)
    np.testing.assert_allclose(f64(delta), exact, rtol=1e-6)
    check_selection(plan, entries, delta)


def test_class_without_elements(device, backend):
    plan = one_class([(0, 64)], k=4, device=device)
    gradient = torch.zeros(0, 64, device=device)
    delta = torch.zeros(0, 1, 64, device=device)
    entries = encode(plan, delta, [gradient], [0.1], decay=DECAY, backend=backend)
    assert entries.indices.shape == entries.values.shape == (0, 4)


@pytest.mark.parametrize("name", ["64x64", "1x64"])
def test_gradients_of_several_dtypes_and_layouts(name, device, backend):
    """Mixed dtypes, float64, rows that are not neighbours, and one number expanded."""
    shapes = [CLASSES[name][0]] * 4
    plan = one_class(shapes, k=4, device=device)
    generator = torch.Generator().manual_seed(6)
    a, b, c, _ = (g.to(device) for g in random(shapes, generator))
    columns = c.t().contiguous().t() if c.dim() > 1 else c.repeat_interleave(2)[::2]
    gradients = [a.bfloat16(), b.double(), columns, torch.ones((), device=device).expand(a.shape)]
    assert gradients[3].stride(-1) == 0
    delta = torch.zeros(plan.chunks, plan.h, plan.w, device=device)
    rates = rates_of(shapes)
    entries = run_encode(plan, delta, gradients, rates, decay=DECAY, backend=backend)
    exact = exact_state(np.zeros(delta.shape), gradients, shapes, rates, DECAY)
    np.testing.assert_allclose(f64(delta), exact, rtol=1e-6)
    check_selection(plan, entries, delta)


@pytest.mark.parametrize("name", ["64x64", "1x64", "64x1"])
def test_own_results_with_repeated_entries(name, device, backend):
    """Several own results side by side: each coefficient is the mean over those that name it."""
    shapes = CLASSES[name]
    plan = one_class(shapes, k=4, device=device)
    generator = torch.Generator().manual_seed(7)
    state = torch.randn(plan.chunks, plan.h, plan.w, generator=generator).to(device)
    size = (plan.chunks, 12)
    indices = torch.randint(0, plan.totalk // 8, size, generator=generator)
    values = torch.randn(size, generator=generator)
    previous = Entries(indices.to(device, plan.index_dtype), values.to(device))
    delta, reference = state.clone(), state.clone()
    rates = rates_of(shapes)
    options = {"decay": DECAY, "previous": previous}
    nothing = [None] * len(shapes)
    encode(plan, reference, nothing, rates, backend="torch", **options)
    entries = run_encode(plan, delta, nothing, rates, backend=backend, **options)
    exact = exact_state(f64(state), nothing, shapes, rates, DECAY, 1.0, previous)
    check_state(delta, reference, exact, support.decoded(previous, plan)[1])
    check_selection(plan, entries, delta)


@pytest.mark.parametrize("name", ["64x64", "1x64"])
def test_rates_as_tensors_are_rates_as_numbers(name, device, backend):
    shapes = CLASSES[name]
    count = len(shapes)
    plan = one_class(shapes, k=4, device=device)
    generator = torch.Generator().manual_seed(8)
    state = torch.randn(plan.chunks, plan.h, plan.w, generator=generator).to(device)
    gradients = [g.to(device) for g in random(shapes, generator)]

    def outcome(rates, scale):
        delta = state.clone()
        entries = encode(
            plan,
            delta,
            gradients,
            rates,
            decay=DECAY,
            gradient_scale=scale,
            backend=backend,
        )
        return [delta, entries.indices.int(), entries.values]

    several = rates_of(shapes)
    one = torch.tensor(0.01, device=device)
    for numbers, tensor in (
        (several, torch.tensor(several, device=device).repeat_interleave(2)[::2]),
        ([0.01] * count, one.view(1)),
        ([0.01] * count, one.expand(count)),
    ):
        pairs = zip(outcome(numbers, 0.5), outcome(tensor, one * 50), strict=True)
        assert all(torch.equal(x, y) for x, y in pairs)


def test_many_programs_and_groups(device, backend):
    """More tiles than programs take at once, and a last group that is not full."""
    check([(64 * 3, 64 * 7)], device, backend, k=2)
    check([(97, 64)] * 3, device, backend, k=2)
