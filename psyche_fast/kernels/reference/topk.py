"""The k coefficients of largest magnitude of every chunk, ties to the lowest index."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d

from psyche_fast.kernels.reference.workspace import ROWS, scratch

_MAGNITUDE_BITS = 0x7FFFFFFF


def largest(coefficients: Tensor, k: int) -> Tensor:
    """Flat indices of the `k` entries of largest magnitude in every row.

    `torch.topk` promises nothing about ties, so it is given unique integer keys: the magnitude's
    bits, which for non-negative floats are ordered like their values, above the reversed index. To
    keep the keys few, only the `k` runs of neighbouring coefficients with the largest maxima are
    looked into: an entry outside of them is preceded by at least `k` others. NaN counts as larger
    than any number.

    Args:
        coefficients: `[n, totalk]`, contiguous, float32 or float64.
        k: how many, `1 <= k <= totalk`.

    Returns:
        int64 `[n, k]`, ascending in each row.
    """
    n, totalk = coefficients.shape
    if k == totalk:
        return torch.arange(totalk, device=coefficients.device).expand(n, totalk)
    if coefficients.dtype != torch.float32:
        # 63 magnitude bits leave no room for an index in a 64-bit key; a stable sort keeps the
        # lower index first.
        order = coefficients.abs().sort(dim=-1, descending=True, stable=True).indices
        return order[:, :k].sort(dim=-1).values
    run = _run_length(totalk, k)
    if run == 1:
        return _by_key(_bits(coefficients), None, totalk, k).sort(dim=-1).values
    # Pooling takes the maxima of runs in one vectorised pass; a reduction over a short last
    # dimension takes twice as long.
    magnitudes = torch.abs(coefficients, out=scratch(ROWS, (n, totalk), coefficients))
    maxima = max_pool1d(magnitudes.unsqueeze(1), run).squeeze(1)
    chosen = _by_key(_bits(maxima), None, totalk // run, k)
    runs = coefficients.view(n, totalk // run, run)
    candidates = runs.gather(1, chosen.unsqueeze(-1).expand(n, k, run)).view(n, k * run)
    within = torch.arange(run, device=coefficients.device)
    index = (chosen.unsqueeze(-1) * run + within).view(n, k * run)
    return _by_key(_bits(candidates), index, totalk, k).sort(dim=-1).values


def _bits(values: Tensor) -> Tensor:
    """The magnitudes' bits: int32, ordered like the magnitudes."""
    return values.view(torch.int32) & _MAGNITUDE_BITS


def _by_key(magnitude: Tensor, index: Tensor | None, limit: int, k: int) -> Tensor:
    """Indices, all below `limit`, of each row's `k` largest; None: the column numbers."""
    if index is None:
        reverse = torch.arange(limit - 1, -1, -1, device=magnitude.device)
    else:
        reverse = (limit - 1) - index
    keys = magnitude.to(torch.int64).bitwise_left_shift_(32).bitwise_or_(reverse)
    best = keys.topk(k, dim=-1, sorted=False).values
    return (limit - 1) - best.bitwise_and_(0xFFFFFFFF)


def _run_length(totalk: int, k: int) -> int:
    """Length of the runs that keeps both rankings short, near `sqrt(totalk / k)`."""
    best, best_cost = 1, totalk
    for run in range(2, 65):
        if totalk % run == 0 and totalk // run >= k:
            cost = totalk // run + k * run
            if cost < best_cost:
                best, best_cost = run, cost
    return best
