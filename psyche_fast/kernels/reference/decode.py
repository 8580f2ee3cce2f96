"""From selected coefficients back to chunks."""

from __future__ import annotations

import torch
from torch import Tensor

from psyche_fast.kernels.plan import ChunkPlan, Entries
from psyche_fast.kernels.reference.transform import inverse
from psyche_fast.kernels.reference.workspace import DENSE, LEFT, RESULT, RIGHT, scratch

# Up to this many entries per chunk they are merged pairwise, m * m comparisons, rather than in a
# dense chunk.
_PAIRWISE_LIMIT = 16


class Decoder:
    """Decodes chunks `[start, stop)` of a class, any part of them at a time.

    Each coefficient is the mean over the entries that name it, zero where there are none, or with a
    divisor their sum divided by it. The order
    of the additions depends on nothing but the order of the entries. Good until the next one is
    made.
    """

    def __init__(
        self, plan: ChunkPlan, entries: Entries, start: int, stop: int, divisor: int | None = None
    ) -> None:
        self._plan, self._start = plan, start
        index, value = _widen(plan, entries, start, stop)
        m = index.shape[1]
        share = 1.0 if divisor is None else 1.0 / divisor
        # So few entries that a sum of outer products is cheaper than the transform.
        self._low_rank = (
            plan.is_transformed
            and plan.h > 1
            and m <= plan.h // 2
            and (entries.unique or divisor is not None or m <= _PAIRWISE_LIMIT)
        )
        if self._low_rank:
            is_sum = entries.unique or divisor is not None
            self._value = value * share if is_sum else _shares(index, value)
            self._row = index.div(plan.w, rounding_mode="floor")
            self._column = index.sub_(self._row, alpha=plan.w)
            return
        self._dense = scratch(DENSE, (stop - start, plan.totalk), value).zero_()
        if entries.unique:
            self._dense.scatter_(1, index, value if divisor is None else value * share)
        elif divisor is not None:
            _add_in(self._dense, index, value)
            self._dense.scatter_(1, index, self._dense.gather(1, index).mul_(share))
        else:
            self._dense.scatter_(1, index, _mean_in(self._dense, index, value))

    def chunks(self, start: int, stop: int) -> Tensor:
        """Chunks `[stop - start, h, w]` in the compute dtype, good until the next call."""
        plan = self._plan
        if not plan.is_transformed:
            return self._dense[start - self._start : stop - self._start].view(-1, plan.h, plan.w)
        result = scratch(RESULT, (stop - start, plan.h, plan.w), plan.basis_w)
        if self._low_rank:
            torch.bmm(*self._factors(start, stop), out=result)
        else:
            inverse(plan, self._dense[start - self._start : stop - self._start], result)
        return result

    def subtract_from(self, target: Tensor, start: int) -> None:
        """`target -= decoded` in place, for the chunks from `start` on."""
        stop = start + target.shape[0]
        if self._low_rank and target.dtype == self._plan.compute_dtype:
            target.baddbmm_(*self._factors(start, stop), alpha=-1.0)
        else:
            target.sub_(self.chunks(start, stop))

    def _factors(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """`U [n, h, m]` and `V [n, m, w]` with `U V = F_h C F_w^T`, `C` being the entries."""
        plan, part = self._plan, slice(start - self._start, stop - self._start)
        value = self._value[part]
        n, m = value.shape
        left = scratch(LEFT, (n, m, plan.h), value)
        right = scratch(RIGHT, (n, m, plan.w), value)
        torch.index_select(plan.rows_h, 0, self._row[part].view(-1), out=left.view(-1, plan.h))
        torch.index_select(plan.rows_w, 0, self._column[part].view(-1), out=right.view(-1, plan.w))
        return left.mul_(value.unsqueeze(-1)).transpose(1, 2), right


def _widen(plan: ChunkPlan, entries: Entries, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Indices in int64 and values in the compute dtype; signs become +1 and -1."""
    index = entries.indices[start:stop].to(torch.int64, copy=True)
    value = entries.values[start:stop]
    if value.dtype == torch.bool:
        return index, 1 - 2 * value.to(plan.compute_dtype)
    return index, value.to(plan.compute_dtype)


def _shares(index: Tensor, value: Tensor) -> Tensor:
    """Each entry's share of its coefficient's mean: the shares add up to the mean.

    The mean is taken first: entries that cancel contribute exactly nothing.
    """
    same = (index.unsqueeze(2) == index.unsqueeze(1)).to(value.dtype)
    multiplicity = same.sum(-1)
    return (same * value.unsqueeze(1)).sum(-1).div_(multiplicity).div_(multiplicity)


def _mean_in(dense: Tensor, index: Tensor, value: Tensor) -> Tensor:
    """For every entry the mean of those with its index; `dense` (zeros) is scratch."""
    multiplicity = dense.scatter_add_(1, index, torch.ones_like(value)).gather(1, index)
    dense.scatter_(1, index, 0.0)
    _add_in(dense, index, value)
    return dense.gather(1, index).div_(multiplicity)


def _add_in(dense: Tensor, index: Tensor, value: Tensor) -> None:
    """`dense[index] += value`, in the order of the entries."""
    if dense.device.type == "cpu":
        dense.scatter_add_(1, index, value)  # row by row
    else:
        # scatter_add_ uses atomics on accelerators, in any order; index_put_ with accumulate sorts
        # instead.
        rows = torch.arange(dense.shape[0], device=dense.device).unsqueeze(1).expand_as(index)
        dense.index_put_((rows, index), value, accumulate=True)
