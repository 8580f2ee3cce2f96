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
    looked into: an entry outside of them is preceded by at least `k` others. These runs are found
    in the same way. NaN counts as larger than any number.

    Args:
        coefficients: `[n, totalk]`, contiguous, float32 or float64.
        k: how many, `1 <= k <= totalk`.
        maxima: what `run_maxima` has made of them, where that is known already.

    Returns:
        Indices, int64 `[n, k]`, ascending in each row, and the values there.
    """
    n, totalk = coefficients.shape
    if k == totalk:
        return torch.arange(k, device=coefficients.device).expand(n, k), coefficients
    run = run_length(totalk, k)
    if coefficients.dtype != torch.float32:
        # 63 magnitude bits leave no room for an index in a 64-bit key; a stable sort keeps the
        # lower index first.
        order = coefficients.abs().sort(dim=-1, descending=True, stable=True).indices
        index = order[:, :k].sort(dim=-1).values
        return index, coefficients.gather(1, index)
    if run == 1:
        return _by_key(coefficients, k)
    if maxima is None:
        maxima = run_maxima(coefficients, run)
    # The runs are in order, and so are their members: candidates with a lower number have a lower
    # index.
    chosen, _ = largest(maxima, k)
    first = torch.arange(0, n * maxima.shape[1], maxima.shape[1], device=chosen.device)
    members = (chosen + first.unsqueeze(1)).view(-1)
    candidates = coefficients.view(-1, run).index_select(0, members).view(n, k * run)
    number, values = _by_key(candidates, k)
    slot = number.div(run, rounding_mode="floor")
    return chosen.gather(1, slot).sub_(slot).mul_(run).add_(number), values


def run_maxima(coefficients: Tensor, run: int) -> Tensor:
    """Largest magnitude of each run of neighbours, `[n, totalk / run]` of `[n, totalk]`."""
    magnitudes = torch.abs(coefficients, out=scratch(ROWS, tuple(coefficients.shape), coefficients))
    # Pooling takes the maxima in one vectorised pass; a reduction over a short last dimension takes
    # twice as long.
    return max_pool1d(magnitudes.unsqueeze(1), run).squeeze(1)


def _by_key(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Column numbers of each row's `k` largest magnitudes, ascending, and the values there."""
    last = values.shape[1] - 1
    keys = (values.view(torch.int32) & _MAGNITUDE_BITS).to(torch.int64).bitwise_left_shift_(32)
    keys.bitwise_or_(torch.arange(last, -1, -1, device=keys.device))
    best = keys.topk(k, dim=-1, sorted=False).values.bitwise_and_(0xFFFFFFFF)
    number = best.neg_().add_(last).sort(dim=-1).values
    return number, values.gather(1, number)


@lru_cache(maxsize=256)
def run_length(totalk: int, k: int) -> int:
    """Length of the runs that keeps both rankings short, near `sqrt(totalk / k)`; 1: no runs."""
    best, best_cost = 1, totalk * 0.6  # what two rankings have to save
    for run in range(2, min(totalk, _LONGEST_RUN) + 1):
        cost = totalk // run + k * run
        if totalk % run == 0 and totalk // run >= k and cost < best_cost:
            best, best_cost = run, cost
    return best
