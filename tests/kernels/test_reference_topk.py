"""The reference selection: exact whatever the ties, in every shape of chunk."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from psyche_fast.kernels.reference.topk import largest, run_length, run_maxima
from tests import oracles


def expected(rows, k):
    return [oracles.top_k(row.double().numpy(), k)[0] for row in rows]


# Those that are ranked by runs, by runs of runs, and by none; 64 x 64 is the usual chunk.
@pytest.mark.parametrize(
    ("h", "w", "k"),
    [
        *((64, 64, k) for k in (1, 8, 32, 64, 300, 4096)),
        *((1, 1, 1), (1, 64, 8), (64, 1, 8), (2, 64, 20), (5, 7, 3)),
        *((50, 50, 8), (53, 64, 8), (64, 53, 8), (22, 38, 8), (64, 48, 32)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exact_whatever_the_ties(h, w, k, dtype):
    generator = torch.Generator().manual_seed(0)
    totalk = h * w
    few = torch.randint(-3, 4, (4, totalk), generator=generator).to(dtype)  # ties everywhere
    sparse = few * (torch.rand(4, totalk, generator=generator) < 2 / totalk)
    rows = torch.stack(
        [
            *few,
            *sparse,
            torch.zeros(totalk, dtype=dtype),
            torch.full((totalk,), -2.5, dtype=dtype),
            torch.arange(totalk, dtype=dtype) % 2 * 1e-40,  # denormals
            -torch.arange(totalk, dtype=dtype),
            torch.randn(totalk, generator=generator, dtype=torch.float64).to(dtype),
        ]
    )
    assert largest(rows, k)[0].tolist() == expected(rows, k)


@settings(max_examples=40, deadline=None)
@given(
    h=st.integers(1, 24),
    w=st.integers(1, 24),
    share=st.floats(0, 1),
    levels=st.integers(1, 50),
    seed=st.integers(0, 9),
)
def test_any_shape(h, w, share, levels, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(-levels, levels + 1, (3, h * w), generator=generator).float()
    k = 1 + int(share * (h * w - 1))
    assert largest(rows, k)[0].tolist() == expected(rows, k)


@pytest.mark.parametrize(("h", "w", "k"), [(1, 5, 2), (32, 32, 4)])
def test_nan_and_infinity_come_first(h, w, k):
    rows = torch.linspace(-1, 1, h * w).repeat(2, 1)
    rows[0, 1], rows[0, h * w - 2] = float("inf"), float("nan")
    rows[1, 3], rows[1, 4] = float("-inf"), float("nan")
    found, _ = largest(rows, k)
    assert {1, h * w - 2} <= set(found[0].tolist())
    assert {3, 4} <= set(found[1].tolist())


def test_maxima_that_are_known_already_are_taken():
    rows = torch.randn(5, 4096, generator=torch.Generator().manual_seed(0))
    run = run_length(4096, 8)
    assert run > 1
    maxima = run_maxima(rows, run)
    assert torch.equal(maxima, rows.view(5, run, 4096 // run).abs().amax(1))
    for known, found in zip(largest(rows, 8, maxima), largest(rows, 8), strict=True):
        assert torch.equal(known, found)


def test_runs_are_divisors_and_save_work():
    for totalk, k in [(4096, 8), (4096, 32), (2500, 8), (3392, 4), (64, 8)]:
        run = run_length(totalk, k)
        assert totalk % run == 0
        assert totalk // run >= k
        assert run == 1 or totalk // run + k * run < totalk
