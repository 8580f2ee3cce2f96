"""What the tests of kernels share: classes, guarded memory, float64 oracles, comparisons.

The oracles are numpy in float64 over the parameters as they are, cut by `tests/oracles.py`; they
share nothing with `psyche_fast`. State is `[chunks, h, w]` in the order of the chunks.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import cache

import numpy as np
import torch

from psyche_fast.distro.chunks import Layout, ParameterLayout
from psyche_fast.kernels.encode import encode
from tests import oracles

TOLERANCE = 4e-5
"""Error of a transform by split bfloat16, relative to the largest coefficient of the chunk (or
element, where it is larger and they are what comes out). Of every product of operands that were cut
in two about 2^-16 is lost, which mostly averages out: to 1e-5 as a rule, to 2.7e-5 at worst in ten
million coefficients."""
FIXED_POINT = 2.0**-21
"""Error of a mean of up to 256 entries in fixed point, relative to the chunk's largest entry."""
TINY = 2.0**-126
"""The smallest normal float32: below it bits are lost, and a GPU may flush to zero."""

CLASSES = {
    "64x64": [(64, 128), (64, 64)],
    "48x64": [(96, 64), (48, 128)],
    "50x50": [(100, 50), (50, 150)],
    "53x64": [(106, 64)],
    "26x64": [(130, 64)],
    "2x64": [(2, 128), (2, 64)],
    "22x38": [(22, 38)],
    "48x48": [(96, 48)],
    "experts": [(2, 64, 64), (2, 1, 64, 64)],
    "64x1": [(128, 1), (64, 67)],
    "1x64": [(64,), (67, 64), (192,)],
    "1x50": [(1, 100), (50,)],
    "1x1": [(67,), (), (1,), (71,)],
    "primes": [(67, 71)],
    "3x5": [(3, 5), (3, 5)],
}
"""Shapes whose parameters form one chunk class each, for a target of 64."""
PLACES = ("whole", "rows", "columns", "odd")
_GUARD = 64  # elements: a multiple of 16 bytes in every dtype
_PATTERNS = {
    torch.float32: (torch.int32, 0x7FC0DEAD),  # NaNs, which spoil what is computed from them
    torch.bfloat16: (torch.int16, 0x7FDE),
    torch.float16: (torch.int16, 0x7E5A),
}


def one_class(shapes, *, k, device, dtype=torch.float32, chunk=64):
    """The plan of parameters that form one chunk class."""
    layouts = [
        ParameterLayout.of(
            str(i), shape, dtype, device, compression_chunk=chunk, compression_topk=k
        )
        for i, shape in enumerate(shapes)
    ]
    (plan,) = Layout(layouts).plans
    return plan


def f64(tensor):
    return tensor.detach().cpu().double().numpy()


class Guarded:
    """A tensor amid memory that must stay as it is, and that is NaN to whoever reads it.

    `how` says where it lies in a bigger one: "whole", some of its "rows", some of its "columns"
    (rows stay 16-byte aligned), or "odd" (rows and columns, nothing aligned).
    """

    def __init__(self, values, how="whole", *, device=None, dtype=None):
        values = values.to(device=device, dtype=dtype)
        integer, pattern = _PATTERNS[values.dtype]
        around = {"whole": (0, 0), "rows": (2, 0), "columns": (0, 8), "odd": (1, 3)}[how]
        shape = list(values.shape)
        margins = [(0, 0)] * len(shape)
        if how == "odd" and len(shape) == 1:
            margins[-1] = (1, 1)
        if len(shape) > 1:
            margins[-2:] = [(around[0], 2 * around[0]), (around[1], around[1])]
        outer = [n + before + after for n, (before, after) in zip(shape, margins, strict=True)]
        size = int(np.prod(outer))
        self._bits = torch.full((size + 2 * _GUARD,), pattern, dtype=integer, device=values.device)
        inner = [slice(before, before + n) for n, (before, _) in zip(shape, margins, strict=True)]
        self._outside = torch.ones_like(self._bits, dtype=torch.bool)
        self._outside[_GUARD : _GUARD + size].view(outer)[(*inner, ...)] = False
        self._pattern = pattern
        self.tensor = self._bits.view(values.dtype)[_GUARD : _GUARD + size].view(outer)[
            (*inner, ...)
        ]
        self.tensor.copy_(values)

    def check(self):
        assert bool((self._bits[self._outside] == self._pattern).all()), "written out of bounds"


def guard(values, how="whole", **options):
    """`Guarded` for every tensor of a list, and the list of tensors; None stays None."""
    guards = [None if v is None else Guarded(v, how, **options) for v in values]
    return guards, [None if g is None else g.tensor for g in guards]


def check_guards(*lists):
    for guarded in lists:
        for g in guarded:
            if g is not None:
                g.check()


@contextmanager
def guarded_allocations():
    """Results and scratch memory that are allocated within get guards too, and start as rubbish."""
    buffers = []
    original = {name: getattr(torch, name) for name in ("empty", "zeros")}

    def allocate(name, *size, **options):
        wanted = original[name](*size, **options)
        n = wanted.numel() * wanted.element_size()
        raw = torch.full((n + 2 * _GUARD * 8,), 0xA5, dtype=torch.uint8, device=wanted.device)
        buffers.append((raw, n))
        inside = raw[_GUARD * 8 : _GUARD * 8 + n].view(wanted.dtype).view(wanted.shape)
        if name == "zeros":
            inside.zero_()
        return inside

    try:
        for name in original:
            setattr(torch, name, lambda *s, _name=name, **o: allocate(_name, *s, **o))
        yield
    finally:
        for name, function in original.items():
            setattr(torch, name, function)
    for raw, n in buffers:
        untouched = torch.cat([raw[: _GUARD * 8], raw[_GUARD * 8 + n :]])
        assert bool((untouched == 0xA5).all()), "written out of bounds"


@cache
def _basis(n):
    return oracles.dct_basis(n)


def to_chunks(array, target=64):
    """`[chunks, h, w]` of one parameter."""
    array = np.atleast_1d(array)
    windows = oracles.chunk_windows(array.shape, target)
    return np.stack([np.atleast_2d(array[window]) for window in windows])


def from_chunks(chunks, shape, target=64):
    out = np.zeros(shape or (1,))
    for window, chunk in zip(oracles.chunk_windows(out.shape, target), chunks, strict=True):
        out[window] = chunk.reshape(out[window].shape)
    return out.reshape(shape)


def all_chunks(arrays, target=64):
    return np.concatenate([to_chunks(a, target) for a in arrays if a.size])


def transform(chunks):
    """Coefficients `[chunks, h * w]`."""
    _, h, w = chunks.shape
    return (_basis(h).T @ chunks @ _basis(w)).reshape(len(chunks), h * w)


def untransform(coefficients, h, w):
    return _basis(h) @ coefficients.reshape(-1, h, w) @ _basis(w).T


def numbers(entries):
    """Indices and values of entries as int64 and float64 arrays; signs become +1 and -1."""
    values = entries.values
    values = 1.0 - 2.0 * f64(values) if values.dtype == torch.bool else f64(values)
    return entries.indices.cpu().to(torch.int64).numpy(), values


def means(entries, totalk):
    """Dense coefficients `[chunks, totalk]`, each the mean over the entries that name it."""
    indices, values = numbers(entries)
    rows = np.arange(len(indices))[:, None]
    sums, counts = np.zeros((2, len(indices), totalk))
    np.add.at(sums, (rows, indices), values)
    np.add.at(counts, (rows, indices), 1)
    return sums / np.maximum(counts, 1)


def largest(coefficients, k):
    """Indices `[chunks, k]` of the largest magnitudes, ties to the lowest, in ascending order."""
    order = np.argsort(-np.abs(coefficients), axis=1, kind="stable")
    return np.sort(order[:, :k], axis=1)


def per_chunk(values, shapes, target=64):
    """One number per member repeated for its chunks, `[chunks, 1, 1]`."""
    counts = [len(to_chunks(np.zeros(s), target)) if 0 not in s else 0 for s in shapes]
    return np.repeat(np.asarray(values, dtype=np.float64), counts)[:, None, None]


def largest_of(*arrays):
    """Largest magnitude in each chunk."""
    return np.max([np.abs(a).reshape(len(a), -1).max(1, initial=0) for a in arrays], axis=0)


def decoded(entries, plan):
    """What entries decode to, `[chunks, h, w]`, and the size of what was added up for it."""
    mean = means(entries, plan.totalk)
    dense = untransform(mean, plan.h, plan.w)
    return dense, largest_of(mean, dense)


def half_ulp(values, dtype):
    """Bound of the error of rounding to a dtype."""
    limits = torch.finfo(dtype)
    return np.maximum(np.abs(values), limits.smallest_normal) * limits.eps / 2 + TINY


def check_selection(plan, entries, state):
    """Entries against the coefficients of the state that they have been read from.

    Returns:
        How many of the indices are those of float64.
    """
    indices, values = numbers(entries)
    assert entries.indices.dtype == plan.index_dtype
    assert entries.values.dtype == plan.dtype
    assert entries.unique
    assert indices.shape == values.shape == (plan.chunks, plan.k)
    assert indices.min() >= 0
    assert indices.max() < plan.totalk
    assert (np.diff(indices, axis=1) > 0).all(), "indices must ascend"
    exact = transform(f64(state))
    error = TOLERANCE * np.abs(exact).max(1, keepdims=True) + TINY
    chosen = np.take_along_axis(exact, indices, axis=1)
    assert (np.abs(values - chosen) <= error + half_ulp(chosen, plan.dtype)).all()
    best = np.take_along_axis(exact, largest(exact, plan.k), axis=1)
    least = np.abs(best).min(1, keepdims=True)
    assert (np.abs(chosen) >= least - 2 * error).all(), "a larger coefficient was left out"
    return (indices == largest(exact, plan.k)).mean()


def exact_state(delta, gradients, shapes, rates, decay, scale=1.0, previous=None, target=64):
    """The state after encode, before rounding."""
    state = delta
    if previous is not None:
        state = state - untransform(means(previous, delta[0].size), *delta.shape[1:])
    filled = [np.zeros(s) if g is None else f64(g) for g, s in zip(gradients, shapes, strict=True)]
    if not np.isfinite(scale):
        return decay * state
    return decay * state + scale * per_chunk(rates, shapes, target) * all_chunks(filled, target)


def check_state(actual, reference, exact, decoded_size):
    """A state's error against the reference backend's own, and the split arithmetic's."""
    own = largest_of(f64(reference) - exact)
    size = largest_of(exact)
    # Of gradient times rate, state times decay, the sum (which may cancel); and where it is stored.
    rounding = 3 * half_ulp(size.max(), torch.float32)
    if actual.dtype != torch.float32:
        rounding += half_ulp(size, actual.dtype)
    error = largest_of(f64(actual) - exact)
    allowed = own + TOLERANCE * decoded_size + rounding
    assert (error <= allowed).all(), (error / allowed).max()


def run_encode(plan, delta, gradients, rates, *, backend, **options):
    """`encode` with its allocations under guard."""
    with guarded_allocations():
        return encode(plan, delta, gradients, rates, backend=backend, **options)


def right_steps(after, before, direction, rate, shrink=None):
    """Where a parameter is `shrink * p - rate * direction`.

    To the bit without `shrink`; with it two roundings to float32 are allowed.
    """
    p, rate = f64(before), float(np.float32(rate))
    if shrink is None:
        exact = p - rate * direction
        rounded = torch.from_numpy(np.asarray(exact)).float().to(after.dtype)
        return f64(after) == f64(rounded)
    shrink = float(np.float32(shrink))
    exact = p * shrink - rate * direction
    allowed = (np.abs(p) + rate) * 2.0**-23 + half_ulp(exact, after.dtype)
    return np.abs(f64(after) - exact) <= allowed


def directions_of(plan, entries, shapes, target=64):
    """Float64 direction of every element, and where it is zero but for rounding, per member."""
    dense, size = decoded(entries, plan)
    error = TOLERANCE * size + FIXED_POINT * largest_of(numbers(entries)[1]) * (size > 0)
    # Where all coefficients are zero there is no doubt.
    doubt = (np.abs(dense) <= error[:, None, None]) & (size > 0)[:, None, None]
    signs, doubts, start = [], [], 0
    for shape in shapes:
        count = 0 if 0 in shape else len(oracles.chunk_windows(shape or (1,), target))
        stop = start + count
        signs.append(np.sign(from_chunks(dense[start:stop], shape, target)))
        doubts.append(from_chunks(doubt[start:stop], shape, target) > 0)
        start = stop
    return signs, doubts


def check_steps(after, before, directions, rates, shrinks=None, doubts=None):
    """Parameters after a signed step; doubtful elements may have gone either way, or nowhere."""
    for i, (p, was) in enumerate(zip(after, before, strict=True)):
        factors = rates[i], None if shrinks is None else shrinks[i]
        right = right_steps(p, was, directions[i], *factors)
        if doubts is not None:
            for way in (-1.0, 0.0, 1.0):
                right |= doubts[i] & right_steps(p, was, way, *factors)
        assert right.all(), f"member {i}: {(~right).sum()} of {right.size} elements are wrong"
