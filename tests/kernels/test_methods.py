"""What methods beside DisTrO have of kernels: chunks as they are, codes, the linear outer step.

Against float64 on parameters that are cut here; where replicas send codes, both backends have to
come to the same bits.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from psyche_fast.distro.chunks import Layout, ParameterLayout
from psyche_fast.kernels import pack as wire
from psyche_fast.kernels.encode import encode, update
from psyche_fast.kernels.outer import Local, outer
from psyche_fast.kernels.plan import Entries
from psyche_fast.kernels.quantise import Codes, dequantise, encode_all, quantise
from tests import oracles
from tests.kernels.support import Guarded, check_guards, f64, guard

DECAY = 0.9

CUTS = {
    "blocks": ([(64, 128), (128, 64)], 64),
    "runs": ([(8192,), (4096,)], 4096),
    "short run": ([(1000,)], 4096),
    "experts": ([(2, 21, 24), (21, 24)], 64),
    "prime rows": ([(67, 64)], 64),
    "a column": ([(53, 1)], 64),
}
"""Kinds of chunks without transform: whole tiles, vectors of several rows of them and of less than
one, sides that are no powers of two in three dimensions, many to a tile, elements that are a row
apart."""


def cut(name, k, *, transform=False, device="cpu"):
    shapes, target = CUTS[name] if isinstance(name, str) else name
    layouts = [
        ParameterLayout.of(
            str(i), s, torch.float32, torch.device(device), compression_chunk=target,
            compression_topk=k,
        )
        for i, s in enumerate(shapes)
    ]  # fmt: skip
    (plan,) = Layout(layouts, transform=transform).plans
    return plan, shapes, target


def chunks_of(tensors, target):
    """Flat chunks of parameters, float64 `[n, elements]`, cut by the oracle's windows."""
    return np.stack(
        [
            f64(t)[window].reshape(-1)
            for t in tensors
            for window in oracles.chunk_windows(t.shape, target)
        ]
    )


def draw(generator, shapes, device):
    return [torch.randn(s, generator=generator).to(device) for s in shapes]


def distinct(generator, plan, peers=1):
    rows = [
        torch.cat([torch.randperm(plan.totalk, generator=generator)[: plan.k].sort().values
                   for _ in range(peers)])
        for _ in range(plan.chunks)
    ]  # fmt: skip
    values = torch.randn(plan.chunks, peers * plan.k, generator=generator)
    index = torch.stack(rows).to(plan.index_dtype)
    return Entries(index.to(plan.device), values.to(plan.device), unique=peers == 1)


@pytest.fixture(params=["torch", "triton"])
def which(request, backend):
    return "torch" if request.param == "torch" else backend


@pytest.mark.parametrize("anchored", [True, False], ids=["anchor", "gradient"])
@pytest.mark.parametrize(
    ("name", "k", "place"),
    [("blocks", 5, "columns"), ("blocks", 100, "whole"), ("runs", 64, "whole"),
     ("short run", 9, "odd"), ("experts", 6, "odd"), ("prime rows", 9, "rows"),
     ("a column", 53, "rows")],
)  # fmt: skip
def test_the_largest_of_chunks_as_they_are(name, k, place, anchored, device, which):
    generator = torch.Generator().manual_seed(0)
    plan, shapes, target = cut(name, k, device=device)
    guards, sources = guard(draw(generator, shapes, "cpu"), place, device=device)
    anchors = draw(generator, shapes, device) if anchored else None
    start = torch.randn(plan.chunks, plan.h, plan.w, generator=generator)
    state = Guarded(start, device=device)
    own = distinct(generator, plan)
    entries = encode(
        plan, state.tensor, sources, [0.5] * len(shapes), decay=DECAY, gradient_scale=0.7,
        previous=own, share=0.2, anchors=anchors, backend=which,
    )  # fmt: skip
    taken = f64(start).reshape(plan.chunks, -1)
    at = f64(own.indices.to(torch.int64)).astype(int)
    for row, (i, v) in enumerate(zip(at, f64(own.values), strict=True)):
        taken[row, i] -= 0.2 * v
    source = chunks_of(sources, target)
    source = chunks_of(anchors, target) - source if anchored else source
    exact = DECAY * taken + 0.35 * source
    after = f64(state.tensor).reshape(plan.chunks, -1)
    assert np.abs(after - exact).max() < 2e-6
    for row, values in enumerate(after):  # of the state as it has been rounded
        best = np.sort(np.argsort(-np.abs(values), kind="stable")[:k])
        assert entries.indices[row].tolist() == best.tolist()
        assert entries.values[row].tolist() == values[best].tolist()
    check_guards(guards, [state])


def test_equal_magnitudes_go_by_index_and_a_bad_scale_leaves_sources_out(device, which):
    plan, shapes, _ = cut("blocks", 7, device=device)
    start = torch.ones(plan.chunks, plan.h, plan.w, device=device)
    start[:, 1, 2] = -1.0
    bad = [torch.full(s, math.nan, device=device) for s in shapes]
    state = start.clone()
    entries = encode(
        plan, state, bad, [1.0] * 2, decay=0.5, gradient_scale=math.inf, anchors=bad, backend=which
    )
    assert torch.equal(state, 0.5 * start)
    assert entries.indices.tolist() == [list(range(7))] * plan.chunks
    update(plan, state, bad, [1.0] * 2, decay=0.5, gradient_scale=math.nan, backend=which)
    assert torch.equal(state, 0.25 * start)


@pytest.mark.parametrize("k", [1, 3, 64, 128])
def test_codes_are_the_same_bits_on_both_backends(k, device, backend):
    plan, _, _ = cut("blocks", k, device=device)
    values = torch.randn(40, k, generator=torch.Generator().manual_seed(k))
    values[0], values[1] = 0.0, values[1, 0]  # nothing, all alike
    values[2:8] *= torch.tensor([1e-42, 1e-35, 1e-20, 1e20, 1e37, 3e-39]).unsqueeze(1)
    values[8, -1] = 1e6  # far from all others
    for bits in (2, 4, 8):
        (mine, seen), (theirs, also) = (
            quantise(plan, values.to(device), bits, backend=b) for b in ("torch", backend)
        )
        assert torch.equal(mine.codes, theirs.codes)
        assert torch.equal(mine.scales, theirs.scales)
        assert torch.equal(seen, also)
        for b in ("torch", backend):
            codes = Codes(mine.codes.expand(2, -1, -1), mine.scales.expand(2, -1, -1))
            assert torch.equal(dequantise(plan, codes, bits, backend=b), seen.expand(2, -1, -1))


def levels(values):
    """Two levels by Lloyd's iterations in float64, and what values become."""
    sizes = np.abs(values)
    low = high = sizes.mean()
    for _ in range(8):
        above = sizes > (low + high) / 2
        high = sizes[above].mean() if above.any() else low
        low = sizes[~above].mean() if not above.all() else high
    low, high = (float(torch.tensor(x).to(torch.bfloat16)) for x in (low, high))
    return np.where(values < 0, -1.0, 1.0) * np.where(sizes > (low + high) / 2, high, low)


def multiples(values, most):
    scale = np.float32(np.abs(values).max() / most)
    return np.round(values / scale) * scale


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_say_what_float64_says(bits, device, which):
    plan, _, _ = cut("blocks", 48, device=device)
    values = torch.randn(30, 48, generator=torch.Generator().manual_seed(1)).to(device)
    _, seen = quantise(plan, values, bits, backend=which)
    for row, got in zip(f64(values), f64(seen), strict=True):
        wanted = levels(row) if bits == 2 else multiples(row, {4: 7, 8: 127}[bits])
        off = np.abs(got - wanted)
        # A level may round to bfloat16 the other way, a value lie between two multiples.
        assert (off > 1e-6 * np.abs(row).max()).mean() <= (0.5 if bits == 2 else 0.05)
        assert off.max() <= np.abs(row).max() * (2.0**-7 if bits == 2 else 1.01 / (2**bits / 2))


@pytest.mark.parametrize("name", ["blocks", "short run", "experts", "prime rows", "a column"])
def test_all_that_is_sent_is_taken_out_where_it_is_made(name, device, backend):
    generator = torch.Generator().manual_seed(0)
    plan, shapes, target = cut(name, 4096, device=device)
    own, anchors = (draw(generator, shapes, device) for _ in range(2))
    start = torch.randn(plan.chunks, plan.h, plan.w, generator=generator).to(device)
    difference = chunks_of(anchors, target) - chunks_of(own, target)
    exact = DECAY * f64(start).reshape(plan.chunks, -1) + difference
    for bits, share, is_exact in ((2, 1.0, False), (4, 0.5, False), (8, 1.0, True), (None, 1.0, 0)):
        found = []
        for b in ("torch", backend):
            state = start.clone()
            out = None
            if bits is None:
                out = torch.empty(plan.chunks, plan.totalk, dtype=torch.bfloat16, device=device)
            codes = encode_all(
                plan, state, own, [1.0] * len(own), bits=bits, out=out, decay=DECAY,
                anchors=anchors, share=share, exact=bool(is_exact), backend=b,
            )  # fmt: skip
            seen = out
            if codes is not None:
                both = Codes(codes.codes[None], codes.scales[None])
                seen = dequantise(plan, both, bits, backend=b)[0]
            found.append((codes, state, seen))
            assert np.abs(f64(seen) - exact).max() < np.abs(exact).max()
            wanted = exact - share * (exact if is_exact else f64(seen))
            assert np.abs(f64(state).reshape(wanted.shape) - wanted).max() < 3e-6
        (mine, _, seen), (theirs, _, also) = found
        # `x` may differ in its last bit, and with the largest of a chunk the unit of all of it.
        off = np.abs(f64(seen) - f64(also)) > 2.0**-22 * np.abs(exact).max(1, keepdims=True)
        assert float(off.mean()) < 0.01
        assert (mine is None) == (theirs is None)
    codes = encode_all(plan, None, own, [1.0] * len(own), bits=8, anchors=anchors, backend=backend)
    seen = dequantise(plan, Codes(codes.codes[None], codes.scales[None]), 8, backend=backend)[0]
    error = np.abs(f64(seen) - difference).max(1)
    assert (error <= np.abs(difference).max(1) / 127 * 0.51).all()


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_levels_of_what_is_not_finite_are_not(wrong):
    """So that receivers refuse them; of other chunks they are as ever."""
    plan, _, _ = cut(([(64, 64 * 3)], 64), 9)
    values = torch.randn(3, 9, generator=torch.Generator().manual_seed(3))
    good, _ = quantise(plan, values, 2)
    values[1, 4] = wrong
    codes, _ = quantise(plan, values, 2)
    assert not codes.scales[1].isfinite().any()
    assert torch.equal(codes.scales[::2], good.scales[::2])
    assert torch.equal(codes.codes[::2], good.codes[::2])


@pytest.mark.parametrize(("shape", "k"), [((64, 64 * 11), 5), ((16, 16 * 9), 256), ((63, 5), 315)])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_travel_with_the_index_code(shape, k, bits, device, backend):
    plan, _, _ = cut(([shape], 16 if shape[0] == 16 else 64), k, device=device)
    generator = torch.Generator().manual_seed(2)
    places = distinct(generator, plan).indices
    codes = torch.randint(1 << bits, places.shape, generator=generator, dtype=torch.uint8)
    entries = Entries(places, codes.to(device), unique=True)
    packed = [wire.pack(plan, entries, bits, backend=b) for b in ("torch", backend)]
    assert torch.equal(*packed)
    assert len(packed[0]) == wire.size(plan, bits)
    received = torch.stack([packed[0], packed[0].flip(0), packed[0]])
    for b in ("torch", backend):
        found, valid = wire.unpack_checked(plan, received, bits, backend=b)
        for peer in (0, 2):
            own = slice(peer * plan.k, (peer + 1) * plan.k)
            assert bool(valid[peer].all())
            assert torch.equal(found.values[:, own], entries.values)
            assert torch.equal(found.indices[:, own], entries.indices)
    if plan.k < plan.totalk:
        assert not bool(valid[1].all())


def mean_of(entries, plan, replicas):
    """Dense mean coefficients, float64 `[n, elements]`."""
    total, count = np.zeros((plan.chunks, plan.totalk)), np.zeros((plan.chunks, plan.totalk))
    at = f64(entries.indices.to(torch.int64)).astype(int)
    for row, (i, v) in enumerate(zip(at, f64(entries.values), strict=True)):
        np.add.at(total[row], i, v)
        np.add.at(count[row], i, 1.0)
    return total / (np.maximum(count, 1.0) if replicas is None else replicas)


MIXES = {"none": None, "copy": (0.0, False), "mix": (0.3, False), "rebase": (0.0, True)}


@pytest.mark.parametrize(
    ("name", "transform", "replicas", "momentum", "mix"),
    [
        ("blocks", False, None, None, "copy"),
        ("blocks", False, 3, 0.8, "mix"),
        ("blocks", True, None, 0.8, "none"),
        ("blocks", True, 3, None, "mix"),
        ("experts", False, "values", 0.8, "rebase"),
        ("experts", True, None, None, "none"),
        ("short run", False, None, 0.8, "rebase"),
        ("runs", False, "values", None, "mix"),
        ("prime rows", True, None, 0.8, "copy"),
        ("a column", False, 3, None, "none"),
        ("a column", True, 3, 0.8, "rebase"),
    ],
)
def test_the_outer_step_is_one_pass(name, transform, replicas, momentum, mix, device, which):
    generator = torch.Generator().manual_seed(3)
    plan, shapes, target = cut(name, 6, transform=transform, device=device)
    start = [draw(generator, shapes, "cpu") for _ in range(4)]
    guards, tensors = zip(
        *(guard(t, "odd" if name == "experts" else "whole", device=device) for t in start),
        strict=True,
    )
    shared, momenta, own, since = tensors
    if replicas == "values":
        results = torch.randn(3, plan.chunks, plan.totalk, generator=generator).to(device)
        mean, divisor = f64(results).mean(0), None
    else:
        results, divisor = distinct(generator, plan, peers=3), replicas
        mean = mean_of(results, plan, divisor)
    if transform:
        shape = (plan.totalk,) if min(plan.h, plan.w) == 1 and plan.h == 1 else (plan.h, plan.w)
        mean = np.stack([oracles.decode_chunk(c.reshape(shape)).reshape(-1) for c in mean])
    how = MIXES[mix]
    local = None if how is None else Local(own, how[0], since if how[1] else None)
    outer(
        plan, shared, results, 0.7, replicas=divisor,
        momenta=None if momentum is None else momenta, momentum=momentum or 0.0, local=local,
        backend=which,
    )  # fmt: skip
    p, u, t, s = (chunks_of(tensor, target) for tensor in start)
    step = mean
    if momentum is not None:
        u = momentum * u + mean
        step = mean + momentum * u
    p = p - 0.7 * step
    if how is not None:
        t = t - s + p if how[1] else how[0] * t + (1 - how[0]) * p
    for wanted, got in zip((p, u, t, s), (shared, momenta, own, since), strict=True):
        assert np.abs(chunks_of(got, target) - wanted).max() < (2e-4 if transform else 2e-6)
    check_guards(*guards)
