"""The k coefficients of largest magnitude of every chunk, ties to the lowest index."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d

from psyche_fast.kernels.reference.workspace import ROWS, scratch

_MAGNITUDE_BITS = 0x7FFFFFFF
_LONGEST_RUN = 64


def largest(coefficients: Tensor, k: int, maxima: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The `k` entries of largest magnitude of every row, ties to the lowest index.

    `torch.topk` promises nothing about ties, so it is given unique integer keys: the magnitude's
    bits, which for non-negative floats are ordered like their values, above the reversed index. To
    keep the keys few, only the `k` runs of neighbouring coefficients with the largest maxima are
    looked into: an entry outside of them is preceded by at least `k` others. These runs are
    determined in the same way. NaN counts as larger than any number.

    Args:
        coefficients: `[n, totalk]`, contiguous, float32 or float64.
        k: how many, `1 <= k <= totalk`.
        maxima: what `run_maxima` returns of them, where that is known already.

    Returns:
        Indices, int64 `[n, k]`, ascending in each row, and their values.
    """
    n, totalk = coefficients.shape
    if k == totalk:
        return torch.arange(k, device=coefficients.device).expand(n, k), coefficients
    if coefficients.dtype == torch.float32:
        index = _chosen(coefficients, k, maxima)
    else:
        # 63 magnitude bits leave no room for an index in a 64-bit key; a stable sort keeps the
        # lower index first.
        index = coefficients.abs().sort(dim=-1, descending=True, stable=True).indices[:, :k]
    index = index.sort(dim=-1).values
    return index, coefficients.gather(1, index)


def _chosen(coefficients: Tensor, k: int, maxima: Tensor | None = None) -> Tensor:
    """Indices of each row's `k` largest magnitudes in no particular order, int64 `[n, k]`."""
    n, totalk = coefficients.shape
    if k == totalk:
        return torch.arange(k, device=coefficients.device).expand(n, k)
    run = run_length(totalk, k)
    # An index counted from the end: the lower of two comes first by having the larger number.
    reverse = torch.arange(totalk - 1, -1, -1, device=coefficients.device)
    if run == 1:
        keys = _magnitude_keys(coefficients).bitwise_or_(reverse)
    else:
        runs = _chosen(run_maxima(coefficients, run) if maxima is None else maxima, k)
        first = torch.arange(0, n * (totalk // run), totalk // run, device=runs.device)
        members = runs.add(first.unsqueeze(1)).view(-1)
        keys = _magnitude_keys(coefficients.view(-1, run).index_select(0, members))
        own = reverse.view(-1, run).index_select(0, runs.reshape(-1))
        keys = keys.bitwise_or_(own).view(n, k * run)
    best = keys.topk(k, dim=-1, sorted=False).values.bitwise_and_(0xFFFFFFFF)
    return best.neg_().add_(totalk - 1)


def _magnitude_keys(values: Tensor) -> Tensor:
    """Magnitudes' bits in the upper half of int64 numbers."""
    return (values.view(torch.int32) & _MAGNITUDE_BITS).to(torch.int64).bitwise_left_shift_(32)


def run_maxima(coefficients: Tensor, run: int) -> Tensor:
    """Largest magnitude of each run of neighbours, `[n, totalk / run]` of `[n, totalk]`."""
    magnitudes = torch.abs(coefficients, out=scratch(ROWS, tuple(coefficients.shape), coefficients))
    # Pooling takes the maxima in one vectorised pass; a reduction over a short last dimension takes
    # twice as long.
    return max_pool1d(magnitudes.unsqueeze(1), run).squeeze(1)


@lru_cache(maxsize=256)
def run_length(totalk: int, k: int) -> int:
    """Length of the runs that keeps both rankings short, near `sqrt(totalk / k)`; 1: no runs."""
    best, best_cost = 1, totalk * 0.6  # what two rankings have to save
    for run in range(2, min(totalk, _LONGEST_RUN) + 1):
        cost = totalk // run + k * run
        if totalk % run == 0 and totalk // run >= k and cost < best_cost:
            best, best_cost = run, cost
    return best
