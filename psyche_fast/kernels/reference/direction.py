"""The direction of an update as `integers.py` defines it: by float32 where that is sure.

Float32 products of the same integers are off by at most a bound; where a row of the result has an
element within it, and only there, the row is computed as the definition has it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from psyche_fast.integers import BITS, LIMB, integer_basis, limbs
from psyche_fast.kernels.plan import ChunkPlan, Entries
from psyche_fast.kernels.reference.workspace import (
    DENSE,
    LEFT,
    RESULT,
    RIGHT,
    SUMS,
    scratch,
)

_CACHED = 1 << 17
"""Elements that are worked on together where entries are many: they stay in a core's cache."""
_EXACT = 1 << 15
"""Elements of doubtful rows that are worked on together, for the same reason."""


class Descent:
    """Minus the direction of chunks `[start, stop)` of a class, any part of them at a time.

    Attributes:
        c: coefficients, integers in float32: of every entry `[n, m]`, or dense `[n, h * w]`.
    """

    def __init__(self, plan: ChunkPlan, entries: Entries, start: int, stop: int) -> None:
        self._plan, self._start = plan, start
        index = entries.indices[start:stop].to(torch.int64)
        self._index, self._unique = index, entries.unique
        n, m = index.shape
        self._is_vector = plan.h == 1 or plan.w == 1
        self._is_dense = not entries.unique and 2 * m >= plan.totalk
        words, factor = _words(entries.values[start:stop])
        if entries.unique:
            self.c = self.share = words.sub_(1).double().mul_(factor).round_().float()
        else:
            step = _chunks_of(_CACHED, plan)
            means = [
                self._mean(index[at : at + step], words[at : at + step], factor)
                for at in range(0, n, step)
            ] or [self._mean(index, words, factor)]
            self.c, self._count = (torch.cat(parts) for parts in zip(*means, strict=True))
            self.share = self.c if self._is_dense else self.c / self._count
        if plan.device.type == "cpu":
            self._limits, self._per_size = self._errors()

    def _mean(self, index: Tensor, words: Tensor, factor: float) -> tuple[Tensor, Tensor]:
        """Coefficients of some chunks, and how many entries name each."""
        sums = scratch(SUMS, (len(index), self._plan.totalk), words).zero_()
        sums.scatter_add_(1, index, words)
        words = sums if self._is_dense else sums.gather(1, index)
        count = words & 0xFFFF
        mean = words.sub_(count).double().mul_(factor)
        if self._is_dense:
            count.clamp_(min=1)
        return mean.div_(count).round_().float(), count

    def chunks(self, start: int, stop: int) -> Tensor:
        """Float32 `[stop - start, h, w]` of -1, 0, 1, good until the next call."""
        plan, part = self._plan, slice(start - self._start, stop - self._start)
        out = scratch(RESULT, (stop - start, plan.h, plan.w), self.c)
        if plan.device.type != "cpu":  # which would have to be waited for
            dense = self._dense(part, exact=True)
            z = dense if self._is_vector else _in_18_bits(_exact_left(plan, dense, None))
            return out.copy_(_right(z).view(out.shape))
        lines = out.view(-1, max(plan.h, plan.w) if self._is_vector else plan.w)
        low_rank = not self._is_vector and self._index.shape[1] <= plan.h // 2
        step = stop - start if low_rank else _chunks_of(_CACHED, plan)
        least, sizes = [], []
        for first in range(0, stop - start, step):
            to = out[first : first + step]
            some = slice(part.start + first, part.start + first + len(to))
            if self._is_vector:
                minus = _tables(lines.shape[1], out.device).minus.t()
                torch.mm(self._dense(some, exact=True), minus, out=to.view(-1, lines.shape[1]))
            elif low_rank:
                sizes.append(self._outer(some, to))
            else:
                sizes.append(self._sandwich(self._dense(some, exact=False), to))
            magnitudes = torch.abs(to, out=scratch(LEFT, tuple(to.shape), to))
            least.append(magnitudes.view(-1, lines.shape[1]).amin(1))
            to.sign_()
        limit = self._limits[part]
        if sizes:
            limit = torch.add(limit, torch.cat(sizes), alpha=self._per_size)
        doubtful = (torch.cat(least).view(len(limit), -1) <= limit).view(-1).nonzero().view(-1)
        if len(doubtful) > 0:
            self._decide(part, doubtful, lines)
        return out

    def _decide(self, part: slice, doubtful: Tensor, lines: Tensor) -> None:
        """Write rows `doubtful` of a part's `lines` as the definition has them."""
        plan = self._plan
        for some in doubtful.split(max(1, _EXACT // self.c.shape[1])):
            if self._is_vector:
                z = self._dense_rows(some.add(part.start))
            else:
                row = some.remainder(plan.h)
                chunk = some.sub(row).floor_divide_(plan.h).add_(part.start)
                if self._is_dense:
                    left = _exact_left(plan, self._dense_rows(chunk), row)
                else:
                    left = self._exact_rows(chunk, row)
                z = _in_18_bits(left)
            lines.index_copy_(0, some, _right(z))

    def _dense_rows(self, chunk: Tensor) -> Tensor:
        """Coefficients `[len(chunk), h * w]`."""
        c = self.c.index_select(0, chunk)
        if self._is_dense:
            return c
        index = self._index.index_select(0, chunk)
        return c.new_zeros(len(c), self._plan.totalk).scatter_(1, index, c)

    def _dense(self, part: slice, *, exact: bool) -> Tensor:
        """Coefficients `[n, h * w]`; unless exact, off by 2^-24 for each entry that names one."""
        if self._is_dense:
            return self.c[part]
        index, c = self._index[part], self.c[part]
        dense = scratch(DENSE, (len(c), self._plan.totalk), c).zero_()
        if exact:
            return dense.scatter_(1, index, c)
        return dense.scatter_add_(1, index, self.share[part])  # several times as fast

    def _exact_rows(self, chunk: Tensor, row: Tensor) -> Tensor:
        """As `_exact_left`, from entries.

        Those of one coefficient add up to it but for float64's rounding, far below the last bit.
        """
        plan = self._plan
        left = _tables(plan.h, chunk.device)
        frequency, column = _split(self._index.index_select(0, chunk), plan.w)
        frequency.add_(row.unsqueeze(1), alpha=plan.h)
        c = self.c.index_select(0, chunk).double()
        # 512 P(A, D) = A D - lo(A) lo(D)
        terms = left.basis.take(frequency).mul_(c)
        terms.sub_(left.low.take(frequency).mul_(limbs(c)[1]))
        if not self._unique:
            terms.div_(self._count.index_select(0, chunk).double())
        z = terms.new_zeros(len(c), plan.w).scatter_add_(1, column, terms)
        return z.div_(LIMB).round_().float()

    def _sandwich(self, dense: Tensor, out: Tensor) -> Tensor:
        """`-B_h C B_w^T / 2^36` into `out`; the largest magnitudes of rows of `B_h C / 2^18`."""
        n, h, w = out.shape
        left, right = _tables(h, out.device).side, _tables(w, out.device).minus.t()
        half = scratch(LEFT, (n, h, w), out)
        torch.bmm(left.expand(n, h, h), dense.view(n, h, w), out=half)
        torch.bmm(half, right.expand(n, w, w), out=out)
        return half.abs_().view(-1, w).amax(1).view(n, h)

    def _outer(self, part: slice, out: Tensor) -> Tensor:
        """As `_sandwich`, a term per entry, and a bound of the magnitudes."""
        n, h, w = out.shape
        value = self.share[part]
        left = scratch(LEFT, (n, value.shape[1], h), out)
        right = scratch(RIGHT, (n, value.shape[1], w), out)
        row, column = _split(self._index[part], w)
        torch.index_select(_tables(h, out.device).rows, 0, row.view(-1), out=left.view(-1, h))
        minus = _tables(w, out.device).minus_rows
        torch.index_select(minus, 0, column.view(-1), out=right.view(-1, w))
        torch.bmm(left.mul_(value.unsqueeze(-1)).transpose(1, 2), right, out=out)
        # A column's sum of magnitudes bounds them.
        sums = value.new_zeros(n, w).scatter_add_(1, column, value.abs())
        return sums.amax(1, keepdim=True)

    def _errors(self) -> tuple[Tensor, float]:
        """How far float32 may be from what the definition takes the sign of.

        In units of `B_h C B_w^T / 2^36`, for any order of additions: sums of n terms are off by
        (n + 4) 2^-24 of the sum of magnitudes, coefficients by one more per entry that names them.
        The definition leaves out products of low parts (1/4 per coefficient, `low_reach` of the
        right product) and rounds `Z'` (2^-24) and `Z` (2^-18 of the row's largest magnitude).
        Without entries, or where they cancel, all is zero and nothing in doubt.

        Returns:
            For each chunk `[n, 1]`, and what is to be added for each unit of the largest magnitude
            of a row of `B_h C / 2^18`.
        """
        plan = self._plan
        total = self.share.abs().sum(1, keepdim=True)
        named = 1 if self._unique or self._index.shape[1] == 0 else int(self._count.max())
        m = min(self._index.shape[1], plan.totalk)
        rows, columns = min(plan.h, m), min(plan.w, m)
        per_total, per_size = (rows + named + 8) * 2.0**-24, 0.0
        if self._is_vector:
            per_total = (max(rows, columns) + named + 8) * 2.0**-24
        else:
            right = _tables(plan.w, plan.device)
            reach = min(columns, right.reach)
            per_size = reach * (2.0**-18 + (columns + 8) * 2.0**-24)
            per_size += min(256 * columns, right.low_reach) * 2.0**-27
        # 1.01 for products of errors, those of magnitudes included, and for this bound's own.
        limits = torch.where(total > 0, total * (1.01 * per_total) + 1.01 * m / 4, -1.0)
        return limits, 1.01 * per_size


def _chunks_of(elements: int, plan: ChunkPlan) -> int:
    return max(1, elements // plan.totalk)


@dataclass(frozen=True)
class _Tables:
    """The basis of one side.

    Attributes:
        basis: `B`, float64.
        side: `B / 2^18`.
        minus: minus the same.
        rows: `side` transposed.
        minus_rows: `minus` transposed.
        high: `hi(B)`.
        low: `lo(B)`.
        reach: largest sum of magnitudes over a row of `side`.
        low_reach: the same of `low`.
    """

    basis: Tensor
    side: Tensor
    minus: Tensor
    rows: Tensor
    minus_rows: Tensor
    high: Tensor
    low: Tensor
    reach: float
    low_reach: float


@cache
def _tables(n: int, device: torch.device) -> _Tables:
    basis = integer_basis(n).to(device)
    high, low = (part.to(_exact_dtype(n)) for part in limbs(basis))
    side = (basis * 2.0**-BITS).float()
    rows = side.t().contiguous()
    reach, low_reach = (float(t.abs().sum(1).max()) for t in (side, low))
    return _Tables(basis, side, -side, rows, -rows, high, low, reach, low_reach)


def _exact_dtype(terms: int) -> torch.dtype:
    """What holds sums of so many products of limbs."""
    return torch.float32 if terms <= 64 else torch.float64


def _words(values: Tensor) -> tuple[Tensor, float]:
    """Values as integers above a count of one, and the factor to coefficients of words less counts.

    Products with the factor are halves away from zero where they would be halves: they round so.
    """
    if values.dtype == torch.bool:
        dtype = torch.int32 if values.shape[1] < 1 << 15 else torch.int64
        minus, plus = (torch.tensor(n, dtype=dtype, device=values.device) for n in (-65535, 65537))
        return torch.where(values, minus, plus), 2.0 ** (BITS - 16) * _AWAY
    values = values.double()
    largest = values.abs().amax(1, keepdim=True) if values.shape[1] else values.new_zeros(1, 1)
    exponent = torch.frexp(largest.float())[1].clamp_(min=-126)
    integers = (values * _power_of_two(30 - exponent)).to(torch.int64)
    return integers.mul_(1 << 16).add_(1), 2.0 ** (-12 - 16) * _AWAY


_AWAY = 1 + 2.0**-49


def _power_of_two(exponent: Tensor) -> Tensor:
    """float64, exact: `ldexp` and `exp2` are what a library makes of them."""
    return ((exponent.to(torch.int64) + 1023) << 52).view(torch.float64)


def _split(index: Tensor, w: int) -> tuple[Tensor, Tensor]:
    """Row and column of flat indices."""
    if w & (w - 1) == 0:  # four times as fast
        return index >> (w.bit_length() - 1), index & (w - 1)
    row = index.div(w, rounding_mode="floor")
    return row, index.sub(row, alpha=w)


def exact_product(a_high: Tensor, a_low: Tensor, b_high: Tensor, b_low: Tensor) -> Tensor:
    """`P(A, B)` of limbs, in their dtype."""
    return (a_low @ b_high).add_(a_high @ b_low).add_(a_high @ b_high, alpha=LIMB)


def _exact_left(plan: ChunkPlan, c: Tensor, row: Tensor | None) -> Tensor:
    """`P(B_h, C)` of dense coefficients `[n, h * w]`, or its rows `row`: float32 `[.., w]`."""
    left = _tables(plan.h, c.device)
    high, low = limbs(c.view(-1, plan.h, plan.w).to(left.high.dtype))
    left_high, left_low = left.high, left.low
    if row is not None:
        left_high, left_low = left_high[row].unsqueeze(1), left_low[row].unsqueeze(1)
    return exact_product(left_high, left_low, high, low).float().view(-1, plan.w)


def _right(z: Tensor) -> Tensor:
    """Minus the sign of `P(Z, B_w^T)` for integers `[n, w]` of up to 18 bits, float32."""
    right = _tables(z.shape[1], z.device)
    high, low = limbs(z.to(right.high.dtype))
    return exact_product(high, low, right.high.t(), right.low.t()).neg_().sign_().float()


def _in_18_bits(z: Tensor) -> Tensor:
    """Rows of integers, each by a power of two of its own, rounded."""
    exponent = torch.frexp(z.abs().amax(1, keepdim=True).clamp_(min=1.0))[1]
    return z.mul(_power_of_two(BITS - exponent).float()).round_()
