"""From selected coefficients back to chunks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from psyche_fast.kernels.plan import ChunkPlan, Entries
from psyche_fast.kernels.reference.transform import ieee_matmul, inverse
from psyche_fast.kernels.reference.update import signed_step
from psyche_fast.kernels.reference.workspace import DENSE, LEFT, RESULT, RIGHT, scratch

# Up to this many entries per chunk they are merged pairwise, m * m comparisons, rather than in a
# dense chunk.
_PAIRWISE_LIMIT = 16


def subtract(
    plan: ChunkPlan,
    delta: Tensor,
    entries: Entries,
    parameters: Sequence[Tensor] | None,
    learning_rates: Sequence[float] | None,
) -> None:
    """See `psyche_fast.kernels.subtract`."""
    with ieee_matmul():
        for part in plan.slices:
            target = delta[part.start : part.stop]
            if parameters is None:
                subtract_slice(plan, target, entries, part.start, part.stop, 1.0)
                continue
            assert learning_rates is not None
            decoded = decode(plan, entries, part.start, part.stop)
            target.sub_(decoded)
            signed_step(plan, part, parameters, decoded.sign_(), learning_rates)


def subtract_slice(
    plan: ChunkPlan, target: Tensor, entries: Entries, start: int, stop: int, factor: float
) -> None:
    """`target = factor * (target - decoded)` in place, `target` being `[stop - start, h, w]`."""
    if _low_rank(plan, entries) and target.dtype == plan.compute_dtype:
        left, right = _factors(plan, entries, start, stop)
        target.baddbmm_(left, right, beta=factor, alpha=-factor)
    else:
        target.sub_(decode(plan, entries, start, stop)).mul_(factor)


def decode(plan: ChunkPlan, entries: Entries, start: int, stop: int) -> Tensor:
    """Chunks `[start, stop)` of the class, `[stop - start, h, w]` in the compute dtype.

    Each coefficient is the mean over the entries that name it, zero where there are none. The order
    of the additions depends on nothing but the order of the entries. The result lies in the slot
    `RESULT` and is good until the next transform.
    """
    if _low_rank(plan, entries):
        left, right = _factors(plan, entries, start, stop)
        result = scratch(RESULT, (stop - start, plan.h, plan.w), right)
        return torch.bmm(left, right, out=result)
    index, value = _widen(plan, entries, start, stop)
    dense = scratch(DENSE, (value.shape[0], plan.totalk), value).zero_()
    if not entries.unique:
        value = _mean_in(dense, index, value)
    dense.scatter_(1, index, value)
    return inverse(plan, dense)


def _low_rank(plan: ChunkPlan, entries: Entries) -> bool:
    """Whether a chunk's entries are so few that a sum of outer products is cheaper."""
    m = entries.indices.shape[1]
    return plan.h > 1 and m <= plan.h // 2 and (entries.unique or m <= _PAIRWISE_LIMIT)


def _factors(plan: ChunkPlan, entries: Entries, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """`U [n, h, m]` and `V [n, m, w]` with `U V = F_h C F_w^T`, `C` being the entries."""
    index, value = _widen(plan, entries, start, stop)
    if not entries.unique:
        value = _shares(index, value)
    m = index.shape[1]
    row = index.div(plan.w, rounding_mode="floor")
    column = index - row * plan.w
    left = scratch(LEFT, (index.shape[0], m, plan.h), value)
    right = scratch(RIGHT, (index.shape[0], m, plan.w), value)
    torch.index_select(plan.rows_h, 0, row.view(-1), out=left.view(-1, plan.h))
    torch.index_select(plan.rows_w, 0, column.view(-1), out=right.view(-1, plan.w))
    return left.mul_(value.unsqueeze(-1)).transpose(1, 2), right


def _widen(plan: ChunkPlan, entries: Entries, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Indices in int64 and values in the compute dtype; signs become +1 and -1."""
    index = entries.indices[start:stop].to(torch.int64)
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
    if dense.device.type == "cpu":
        dense.scatter_add_(1, index, value)  # row by row, in the order of the entries
    else:
        # scatter_add_ uses atomics on accelerators, in any order; index_put_ with accumulate sorts
        # instead.
        rows = torch.arange(dense.shape[0], device=dense.device).unsqueeze(1).expand_as(index)
        dense.index_put_((rows, index), value, accumulate=True)
    return dense.gather(1, index).div_(multiplicity)
