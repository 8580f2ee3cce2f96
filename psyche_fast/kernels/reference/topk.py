"""The k coefficients of largest magnitude of every chunk, ties to the lowest index."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

_MAGNITUDE_BITS = 0x7FFFFFFF
_LONGEST_RUN = 64


def largest(columns: Tensor, k: int, maxima: Tensor | None = None) -> Tensor:
    """Flat indices of the `k` entries of largest magnitude in every chunk.

    `torch.topk` promises nothing about ties, so it is given unique integer keys: the magnitude's
    bits, which for non-negative floats are ordered like their values, above the reversed index. To
    keep the keys few, only the `k` runs of neighbouring coefficients with the largest maxima are
    looked into: an entry outside of them is preceded by at least `k` others. These runs are found
    in the same way. NaN counts as larger than any number.

    Args:
        columns: coefficients column by column, `[n, w, h]`, contiguous, float32 or float64.
        k: how many, `1 <= k <= h * w`.
        maxima: what `run_maxima` has made of them, where that is known already.

    Returns:
        int64 `[n, k]`, indices `row * w + column`, ascending in each row.
    """
    n, w, h = columns.shape
    if k == h * w:
        return torch.arange(k, device=columns.device).expand(n, k)
    flat = columns.view(n, h * w)
    if columns.dtype != torch.float32:
        # 63 magnitude bits leave no room for an index in a 64-bit key; a stable sort keeps the
        # lower index first.
        rows = columns.transpose(1, 2).reshape(n, h * w)
        order = rows.abs().sort(dim=-1, descending=True, stable=True).indices
        return order[:, :k].sort(dim=-1).values
    run = run_length(h, w, k)
    if run == 1:
        index = torch.arange(h * w, device=columns.device).view(h, w).t().reshape(-1)
        return _best(flat, index, k)
    if maxima is None:
        maxima = run_maxima(columns, run)
    chosen = largest(maxima, k)
    # The runs are in order, and so are their members: candidates with a lower number have a lower
    # index.
    row = chosen.div(w // run, rounding_mode="floor")
    first = (chosen - row * (w // run)).mul_(run * h).add_(row)
    along = torch.arange(0, run * h, h, device=columns.device)
    candidates = flat.gather(1, (first.unsqueeze(-1) + along).view(n, k * run))
    best = _best(candidates, torch.arange(k * run, device=columns.device), k)
    slot = best.div(run, rounding_mode="floor")
    return chosen.gather(1, slot).sub_(slot).mul_(run).add_(best)


def run_maxima(columns: Tensor, run: int) -> Tensor:
    """Largest magnitude of each run of neighbours in a row: `[n, w / run, h]` of `[n, w, h]`."""
    n, w, h = columns.shape
    # Neighbours of a row lie h apart, so that h maxima are taken abreast.
    runs = columns.view(n, w // run, run, h)
    return torch.maximum(runs.amax(2), runs.amin(2).neg_())


def _best(values: Tensor, index: Tensor, k: int) -> Tensor:
    """Of the numbers `index` of the columns those of each row's `k` largest magnitudes, sorted."""
    limit = index.numel() - 1
    keys = (values.view(torch.int32) & _MAGNITUDE_BITS).to(torch.int64)
    keys = keys.bitwise_left_shift_(32).bitwise_or_(limit - index)
    best = keys.topk(k, dim=-1, sorted=False).values.bitwise_and_(0xFFFFFFFF)
    return best.neg_().add_(limit).sort(dim=-1).values


@lru_cache(maxsize=256)
def run_length(h: int, w: int, k: int) -> int:
    """Length of the runs that keeps both rankings short, near `sqrt(h * w / k)`; 1: no runs."""
    best, best_cost = 1, h * w * 0.6  # what two rankings have to save
    for run in range(2, min(w, _LONGEST_RUN) + 1):
        cost = h * w // run + k * run
        if w % run == 0 and h * w // run >= k and cost < best_cost:
            best, best_cost = run, cost
    return best
