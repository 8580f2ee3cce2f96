"""Selection by rounds and by threshold, of coefficients given bit by bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from psyche_fast.kernels.triton import encode, rows

largest_in_rounds = encode.largest_in_rounds
largest_by_threshold = rows.largest_by_threshold
store_sorted = encode.store_sorted
TILES = 4


@triton.jit
def by_rounds(
    coefficients,
    maxima,
    indices,
    values,
    tiles,
    K: tl.constexpr,
    KP: tl.constexpr,
    T: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    w: tl.constexpr,
):
    t = tl.arange(0, T)
    of_rows = tl.load(maxima + t[:, None] * H + tl.arange(0, H)[None, :])
    at = t.to(tl.int64) * K
    largest_in_rounds(
        coefficients, of_rows, at, t < tiles, indices, values, K, KP, T, H, W, w, "evict_last"
    )


@triton.jit
def by_threshold(
    coefficients,
    indices,
    values,
    tiles,
    K: tl.constexpr,
    T: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    h: tl.constexpr,
    w: tl.constexpr,
):
    t = tl.arange(0, T)
    place = tl.arange(0, H * W)[None, :]
    row = place // W
    column = place - row * W
    largest_by_threshold(
        tl.load(coefficients + t[:, None] * (H * W) + place),
        row * w + column,
        (row < h) & (column < w),
        t.to(tl.int64) * K,
        t < tiles,
        indices,
        values,
        K,
    )


def select(way, coefficients, k, device, tiles=TILES):
    """Indices and values `[TILES, k]` of `[TILES, h, w]`; rows of absent tiles are -1."""
    _, h, w = coefficients.shape
    H, W = (max(16, triton.next_power_of_2(n)) for n in (h, w))
    padded = torch.full((TILES, H, W), 1e38)  # padding must not be taken
    padded[:, :h, :w] = coefficients
    indices = torch.full((TILES, k), -1, dtype=torch.int32, device=device)
    values = torch.full((TILES, k), -1.0, device=device)
    sizes = {"K": k, "T": TILES, "H": H, "W": W, "w": w, "enable_fp_fusion": False}
    if way == "threshold":
        by_threshold[(1,)](padded.to(device), indices, values, tiles, h=h, **sizes)
    else:
        maxima = torch.full((TILES, H), -1, dtype=torch.int32)
        bits = coefficients.contiguous().view(torch.int32) & 0x7FFFFFFF
        maxima[:, :h] = bits.amax(2)
        kp = max(2, triton.next_power_of_2(k))
        arguments = padded.to(device), maxima.to(device), indices, values, tiles
        by_rounds[(1,)](*arguments, KP=kp, **sizes)
    return indices.cpu().numpy(), values.cpu().numpy()


def expected(coefficients, k):
    """Sorted by magnitude's bits, then by index, in Python."""
    flat = coefficients.reshape(TILES, -1).numpy()
    keys = flat.view(np.int32) & 0x7FFFFFFF
    order = [sorted(sorted(range(flat.shape[1]), key=lambda i: (-row[i], i))[:k]) for row in keys]
    return np.array(order), np.take_along_axis(flat, np.array(order), 1)


def check(way, coefficients, k, device):
    indices, values = select(way, coefficients, k, device)
    wanted_indices, wanted_values = expected(coefficients, k)
    assert (indices == wanted_indices).all()
    assert (values.view(np.int32) == wanted_values.view(np.int32)).all()


def coefficients_of(kind, h, w):
    generator = torch.Generator().manual_seed(0)
    shape = (TILES, h, w)
    plain = torch.randn(shape, generator=generator)
    whole = torch.randint(-2, 3, shape, generator=generator).float()
    return {
        "random": plain,
        "few magnitudes of either sign": whole,
        "all equal but for signs": torch.where(plain < 0, -1.0, 1.0),
        "zeros of either sign": torch.where(plain < 0, -0.0, 0.0),
        "one number among zeros": torch.zeros(shape).index_fill_(2, torch.tensor([w - 1]), 3.0),
        "subnormal": 1e-44 * torch.randint(-9, 10, shape, generator=generator),
        "infinities and not a number": torch.where(
            whole == 2, torch.inf, torch.where(whole == -2, torch.nan, plain)
        ),
    }[kind]


KINDS = [
    "random",
    "few magnitudes of either sign",
    "all equal but for signs",
    "zeros of either sign",
    "one number among zeros",
    "subnormal",
    "infinities and not a number",
]


@pytest.mark.parametrize("way", ["rounds", "threshold"])
@pytest.mark.parametrize(
    ("kind", "h", "w", "k"),
    [(kind, 22, 38, 9) for kind in KINDS]  # padded to 32 x 64
    + [(kind, 3, 5, 15) for kind in KINDS[-2:]]  # all of them
    + [("few magnitudes of either sign", 64, 64, 32), ("random", 2, 64, 64)],
)
def test_selection(way, kind, h, w, k, device, backend):
    check(way, coefficients_of(kind, h, w), k, device)


@pytest.mark.parametrize(
    ("kind", "k"), [*((kind, 255) for kind in KINDS), ("random", 1), ("random", 256)]
)
def test_threshold_takes_any_number(kind, k, device, backend):
    check("threshold", coefficients_of(kind, 16, 16), k, device)


@pytest.mark.parametrize("way", ["rounds", "threshold"])
def test_absent_tiles_are_not_written(way, device, backend):
    coefficients = coefficients_of("random", 10, 13)
    indices, values = select(way, coefficients, 4, device, tiles=3)
    assert (indices[:3] == expected(coefficients, 4)[0][:3]).all()
    assert (indices[3] == -1).all()
    assert (values[3] == -1).all()


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    way=st.sampled_from(["rounds", "threshold"]),
    h=st.integers(1, 16),
    w=st.integers(1, 16),
    k=st.integers(1, 64),
    magnitudes=st.integers(1, 4),
    seed=st.integers(0, 10_000),
)
def test_ties(device, backend, way, h, w, k, magnitudes, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = (TILES, h, w)
    coefficients = torch.randint(-magnitudes, magnitudes + 1, shape, generator=generator).float()
    check(way, coefficients, min(k, h * w), device)


def test_rounds_and_threshold_agree_where_one_takes_over(device, backend):
    coefficients = coefficients_of("few magnitudes of either sign", 64, 64)
    for one, other in zip(
        select("rounds", coefficients, 64, device),
        select("threshold", coefficients, 64, device),
        strict=True,
    ):
        assert (one == other).all()
