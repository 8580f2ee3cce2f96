"""The k coefficients of largest magnitude of every chunk, ties to the lowest index."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

_MAGNITUDE_BITS = 0x7FFFFFFF
_LONGEST_RUN = 64
_RANKED_AT_ONCE = 256  # a ranking costs as much as some hundred numbers


def largest(coefficients: Tensor, k: int, maxima: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The `k` entries of largest magnitude of every row, ties to the lowest index.

    To rank few, only the `k` runs of coefficients with the largest maxima are looked into: an entry
    outside of them comes after at least `k` others. These runs are determined in the same way. NaN
    counts as larger than any number.

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
    if coefficients.dtype != torch.float32:
        # 63 magnitude bits leave no room for an index in a 64-bit key; a stable sort keeps the
        # lower index first.
        index = coefficients.abs().sort(dim=-1, descending=True, stable=True).indices[:, :k]
    elif coefficients.device.type != "cpu":  # which would have to be waited for
        index = _by_keys(coefficients, k)
    else:
        index, is_clear = _by_values(coefficients, k, maxima)
        tied = is_clear.logical_not_().nonzero().view(-1)
        if len(tied) > 0:
            index.index_copy_(0, tied, _by_keys(coefficients.index_select(0, tied), k))
    index = index.sort(dim=-1).values
    return index, coefficients.gather(1, index)


def _by_values(coefficients: Tensor, k: int, maxima: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Indices `[n, k]` in no particular order, and whether they are clear: bool `[n]`.

    They are where the last one is larger than the next: no tie decided. Of `k + 1` runs at least as
    many coefficients are no less than any of another run: one of the latter that belonged here, or
    might by a tie, would leave it unclear.
    """
    run = run_length(coefficients.shape[1], k)
    magnitudes, members = coefficients, None
    if run > 1:
        maxima = run_maxima(coefficients, run) if maxima is None else maxima
        members = _members(_top(maxima, k + 1), maxima.shape[1], run)
        magnitudes = coefficients.gather(1, members)
    values, index = magnitudes.abs().topk(k + 1, dim=1)
    index = index[:, :k]
    is_clear = values[:, k - 1] > values[:, k]
    return index if members is None else members.gather(1, index), is_clear


def _top(values: Tensor, k: int) -> Tensor:
    """Indices of the `k` largest of each row, ties in any way and all where there are no more."""
    n, count = values.shape
    if k >= count:
        return torch.arange(count).expand(n, count)
    run = run_length(count, k)
    if run == 1:
        return values.topk(k, dim=1, sorted=False).indices
    maxima = values.view(n, run, -1).amax(1)
    members = _members(_top(maxima, k), maxima.shape[1], run)
    return members.gather(1, values.gather(1, members).topk(k, dim=1, sorted=False).indices)


def _members(runs: Tensor, count: int, run: int) -> Tensor:
    """Indices of all coefficients of runs, of which there are `count`."""
    first = torch.arange(0, count * run, count).unsqueeze(1)
    return runs.unsqueeze(1).add(first).view(len(runs), -1)


def _by_keys(coefficients: Tensor, k: int) -> Tensor:
    """Indices of each row's `k` largest magnitudes in no particular order, int64 `[n, k]`.

    `torch.topk` promises nothing about ties, so it is given unique integer keys: the magnitude's
    bits, which for non-negative floats are ordered like their values, above the reversed index.
    """
    n, totalk = coefficients.shape
    if k == totalk:
        return torch.arange(k, device=coefficients.device).expand(n, k)
    run = run_length(totalk, k)
    # An index counted from the end: the lower of two comes first by having the larger number.
    reverse = torch.arange(totalk - 1, -1, -1, device=coefficients.device)
    if run == 1:
        keys = _magnitude_keys(coefficients).bitwise_or_(reverse)
    else:
        # Runs of neighbours: of two with one maximum, the first has it at the lower index.
        maxima = coefficients.abs().view(n, -1, run).amax(2)
        runs = _by_keys(maxima, k)
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
    """Largest magnitudes `[n, totalk / run]`; every `totalk / run`-th coefficient is of one run.

    Maxima of neighbours would take longer.
    """
    runs = coefficients.view(len(coefficients), run, -1)
    return torch.maximum(runs.amax(1), runs.amin(1).neg_())  # magnitudes would have to be written


@lru_cache(maxsize=256)
def run_length(totalk: int, k: int) -> int:
    """Length of the runs that keeps both rankings short, near `sqrt(totalk / k)`; 1: no runs."""
    if totalk <= _RANKED_AT_ONCE:
        return 1
    best, best_cost = 1, totalk * 0.6  # what two rankings have to save
    for run in range(2, min(totalk, _LONGEST_RUN) + 1):
        cost = totalk // run + k * run
        if totalk % run == 0 and totalk // run >= k and cost < best_cost:
            best, best_cost = run, cost
    return best
