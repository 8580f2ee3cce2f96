"""The direction of an update as `integers.py` defines it: by float32 where that is sure.

Float32 products of the same integers are off by at most a bound; where a row of the result has an
element within it, and only there, the row is computed as the definition has it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from psyche_fast.integers import BITS, LIMB, integer_basis, limbs
from psyche_fast.kernels.plan import ChunkPlan, Entries
from psyche_fast.kernels.reference.workspace import (
    COEFFICIENTS,
    COUNTS,
    DENSE,
    LEAST,
    LEFT,
    LIMBS,
    MAGNITUDES,
    RESULT,
    RIGHT,
    SUMS,
    scratch,
)

_CACHED = 1 << 17
"""Elements that a thread works on at a time: they stay in a core's cache."""
_ENTRIES = 1 << 14
"""Entries of rows in doubt that are worked on together, for the same reason."""
_LINE = 64
"""The shortest rows that are looked through one by one: calls per row cost more than elements."""
_FEW = 64
"""Signs of so many peers have a mean that float32 rounds to the right integer: it differs from a
half by 1/126 or more, and the quotient is off by less."""


class Descent:
    """Minus the direction of chunks `[start, stop)` of a class, any part of them at a time.

    Attributes:
        c: coefficients, integers in float32: of every entry `[n, m]`, or dense `[n, h * w]`.
    """

    def __init__(self, plan: ChunkPlan, entries: Entries, start: int, stop: int) -> None:
        self._plan, self._start = plan, start
        index, values = entries.indices[start:stop], entries.values[start:stop]
        m = index.shape[1]
        self._entries, self._unique, self._named = m, entries.unique, 1
        self._is_vector = plan.h == 1 or plan.w == 1
        self._is_dense = not entries.unique and 8 * m >= plan.totalk
        self._is_low_rank = not self._is_vector and not self._is_dense and m <= plan.h // 2
        if self._is_dense:
            self._dense_means(index, values)
        else:
            self._index = index.to(torch.int64)
            if entries.unique:
                self.c = self.share = _mean(*_integers(values, are_few=True), 1.0).float()
            else:
                self._sparse_means(values)
            self._total = self.share.abs().sum(1, keepdim=True)
        if plan.device.type == "cpu":
            if self._is_low_rank:
                self._row, self._column = _split(self._index, plan.w)
            self._limits, self._per_size = self._errors()

    @staticmethod
    def held(plan: ChunkPlan, entries: Entries) -> int:
        """How many elements' room a chunk takes."""
        return min(plan.totalk, 8 * entries.indices.shape[1])

    def _dense_means(self, index: Tensor, values: Tensor) -> None:
        """All coefficients of chunks that have many entries, and a bound of sums of magnitudes."""
        plan, n = self._plan, len(index)
        self.c = scratch(COEFFICIENTS, (n, plan.totalk), _tables(plan.w, plan.device).side)
        self._total = self.c.new_empty(n, 1)
        step = _chunks_at_once(plan)
        for at in range(0, n, step):
            some = slice(at, at + step)
            where, c = index[some].to(torch.int64), self.c[some]
            count = scratch(COUNTS, tuple(c.shape), c).zero_()
            count.scatter_add_(1, where, c.new_ones(1, 1).expand(where.shape))
            integers, factor = _integers(values[some], _are_few(values, count))
            sums = c if integers.dtype == c.dtype else scratch(SUMS, tuple(c.shape), integers)
            sums.zero_().scatter_add_(1, where, integers)
            mean = _mean(sums, factor, count.clamp_(min=1))
            if sums is not c:
                c.copy_(mean)
            torch.linalg.vector_norm(c, dim=1, keepdim=True, out=self._total[some])
        # By Cauchy and Schwarz the root of the number of coefficients times their norm bounds their
        # sum; of products with the bases, whose rows have norms of `sqrt(n / 2)`, that of all.
        number = min(self._entries, plan.totalk / (2 if self._is_vector else 4))
        self._total.mul_(math.sqrt(number))

    def _sparse_means(self, values: Tensor) -> None:
        """The coefficient that each entry names, and the entry's share of it."""
        self._count = torch.ones(values.shape, device=values.device)
        self._add_up(self._count)
        integers, factor = _integers(values, _are_few(values, self._count))
        self._add_up(integers)
        self.c = _mean(integers, factor, self._count).float()
        self.share = self.c / self._count
        if self._count.numel() > 0 and self._plan.device.type == "cpu":
            self._named = int(self._count.max())

    def _add_up(self, entries: Tensor) -> None:
        """Put in place of each entry the sum of those that name the same coefficient."""
        step = _chunks_at_once(self._plan)
        for index, some in zip(self._index.split(step), entries.split(step), strict=True):
            sums = scratch(SUMS, (len(some), self._plan.totalk), some).zero_()
            torch.gather(sums.scatter_add_(1, index, some), 1, index, out=some)

    def chunks(self, start: int, stop: int) -> Tensor:
        """Float32 `[stop - start, h, w]` of -1, 0, 1, good until the next call."""
        plan, part = self._plan, slice(start - self._start, stop - self._start)
        out = scratch(RESULT, (stop - start, plan.h, plan.w), self.c)
        if plan.device.type != "cpu":  # which would have to be waited for
            dense = self._dense_rows(torch.arange(part.start, part.stop, device=out.device))
            z = dense if self._is_vector else _in_18_bits(_exact_left(plan, dense))
            return out.copy_(_right(z).view(out.shape))
        # Lines are rows, or some short ones of a chunk.
        rows = 1 if self._is_vector else _rows_of_a_line(plan.h, plan.w)
        length = rows * (plan.totalk if self._is_vector else plan.w)
        least = scratch(LEAST, (out.numel() // length,), out)
        blocks = out.split(_chunks_at_once(plan))
        magnitudes = scratch(MAGNITUDES, tuple(blocks[0].shape), out)
        lines, sizes = least.split(blocks[0].numel() // length), []
        for to, line, size in zip(blocks, lines, self._products(part, blocks, length), strict=True):
            some = magnitudes if len(to) == len(magnitudes) else magnitudes[: len(to)]
            torch.amin(torch.abs(to, out=some).view(-1, length), 1, out=line)
            to.sign_()
            sizes.append(size)
        limit = self._limits[part]
        if self._per_size > 0:
            limit = torch.add(limit, torch.cat(sizes).view(len(limit), -1), alpha=self._per_size)
        doubtful = (least.view(len(limit), -1) <= limit).view(-1).nonzero()
        if len(doubtful) > 0:
            if rows > 1:
                doubtful = doubtful.mul(rows).add(torch.arange(rows))
            self._decide(part, doubtful.view(-1), out.view(-1, length // rows))
        return out

    def _products(self, part: slice, blocks: Sequence[Tensor], length: int) -> Iterator[Tensor]:
        """`-B_h C B_w^T / 2^36` as float32 has it, block by block.

        Args:
            part: chunks.
            blocks: `[n, h, w]` each, of the same number but for the last; written.
            length: of the lines whose largest magnitudes are asked for.

        Yields:
            The largest magnitudes of lines of `B_h C / 2^18`, where that hangs on more than the
            chunk; whenever a block has been written.
        """
        n, h, w = blocks[0].shape
        device = blocks[0].device
        if self._is_low_rank:
            for to, left, right in zip(
                blocks, *(t.split(n) for t in self._factors(part)), strict=True
            ):
                yield torch.bmm(left.transpose(1, 2), right, out=to)
            return
        dense = self._dense(part, n)
        if self._is_vector:
            minus = _tables(h * w, device).minus.t()
            for to, c in zip(blocks, dense, strict=True):
                yield torch.mm(c, minus, out=to.view(c.shape))
            return
        left = _tables(h, device).side.expand(n, h, h)
        right = _tables(w, device).minus.t().expand(n, w, w)
        half = scratch(MAGNITUDES, (n, h, w), blocks[0])
        for to, c in zip(blocks, dense, strict=True):
            if len(to) < n:
                n = len(to)
                left, right, half = left[:n], right[:n], half[:n]
            torch.bmm(left, c.view(to.shape), out=half)
            torch.bmm(half, right, out=to)
            lines = half.view(-1, length)
            yield torch.maximum(lines.amax(1), lines.amin(1).neg_())

    def _decide(self, part: slice, doubtful: Tensor, lines: Tensor) -> None:
        """Write rows `doubtful` of a part's `lines` as the definition has them."""
        plan = self._plan
        if self._is_vector:
            z = self._dense_rows(doubtful.add(part.start))
        else:
            row = doubtful.remainder(plan.h)
            chunk = doubtful.sub(row).floor_divide_(plan.h).add_(part.start)
            exact = self._exact_of_dense if self._is_dense else self._exact_of_entries
            z = _in_18_bits(exact(chunk, row))
        lines.index_copy_(0, doubtful, _right(z))

    def _dense_rows(self, chunk: Tensor) -> Tensor:
        """Coefficients `[len(chunk), h * w]`."""
        c = self.c.index_select(0, chunk)
        if self._is_dense:
            return c
        index = self._index.index_select(0, chunk)
        return c.new_zeros(len(c), self._plan.totalk).scatter_(1, index, c)

    def _dense(self, part: slice, n: int) -> Iterator[Tensor]:
        """Coefficients `[n, h * w]`, off by 2^-24 for each entry that names one; `n` at a time."""
        if self._is_dense:
            yield from self.c[part].split(n)
            return
        for index, share in zip(self._index[part].split(n), self.share[part].split(n), strict=True):
            dense = scratch(DENSE, (len(share), self._plan.totalk), share)
            yield dense.zero_().scatter_add_(1, index, share)

    def _exact_of_dense(self, chunk: Tensor, row: Tensor) -> Tensor:
        """Rows `row` of `P(B_h, C)`, `C` of chunks `chunk` in order: float32 `[.., w]`.

        All rows of a chunk at once, `R` of each, where there are fewer the first one several times.
        `P(A, D)` is `hi(A) lo(D) + lo(A) hi(D)` and 512 times `0 lo(D) + hi(A) hi(D)`.
        """
        plan, left = self._plan, _tables(self._plan.h, chunk.device).paired
        chunk, of, count = chunk.unique_consecutive(return_inverse=True, return_counts=True)
        most = int(count.max())
        place = torch.arange(len(row)).sub_((count.cumsum(0) - count)[of])
        place.add_(of, alpha=most)
        rows = row.new_zeros(len(chunk) * most).index_copy_(0, place, row).view(-1, most)
        step = max(1, _CACHED // 2 // plan.totalk)
        parts = []
        for some, those in zip(chunk.split(step), rows.split(step), strict=True):
            c = self.c.index_select(0, some)
            both = scratch(LIMBS, (len(some), 2, plan.totalk), left)
            torch.mul(c, 1 / LIMB, out=both[:, 1]).round_()
            torch.sub(c, both[:, 1], alpha=LIMB, out=both[:, 0])
            factors = left.index_select(0, those.view(-1)).view(len(some), 2 * most, 2 * plan.h)
            products = factors.bmm(both.view(len(some), 2 * plan.h, plan.w))
            small, large = products.view(-1, 2, plan.w).unbind(1)
            parts.append(small.add_(large, alpha=LIMB))
        return torch.cat(parts).index_select(0, place).float()

    def _exact_of_entries(self, chunk: Tensor, row: Tensor) -> Tensor:
        """As `_exact_of_dense`, from entries.

        Those of one coefficient add up to it but for float64's rounding, far below the last bit.
        """
        step = max(1, _ENTRIES // self.c.shape[1])
        pairs = zip(chunk.split(step), row.split(step), strict=True)
        return torch.cat([self._sum_of_entries(*pair) for pair in pairs]).round_().float()

    def _sum_of_entries(self, chunk: Tensor, row: Tensor) -> Tensor:
        """Rows `row` of `P(B_h, C)`, all but rounded to integers: float64."""
        plan = self._plan
        left = _tables(plan.h, chunk.device).both
        frequency, column = _split(self._index.index_select(0, chunk), plan.w)
        frequency.add_(row.unsqueeze(1), alpha=2 * plan.h)
        c = self.c.index_select(0, chunk)
        terms = left.take(frequency).mul_(c)
        terms.addcmul_(left.take(frequency.add_(plan.h)), c.div_(LIMB).round_().double())
        if not self._unique:
            terms.div_(self._count.index_select(0, chunk))
        return terms.new_zeros(len(c), plan.w).scatter_add_(1, column, terms)

    def _factors(self, part: slice) -> tuple[Tensor, Tensor]:
        """`U [n, m, h]` and `V [n, m, w]` with `U^T V` what `_products` is to come to."""
        plan, value = self._plan, self.share[part]
        left = scratch(LEFT, (*value.shape, plan.h), value)
        right = scratch(RIGHT, (*value.shape, plan.w), value)
        rows, minus = _tables(plan.h, value.device).rows, _tables(plan.w, value.device).minus_rows
        torch.index_select(rows, 0, self._row[part].view(-1), out=left.view(-1, plan.h))
        torch.index_select(minus, 0, self._column[part].view(-1), out=right.view(-1, plan.w))
        return left.mul_(value.unsqueeze(-1)), right

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
        plan, total = self._plan, self._total
        m = min(self._entries, plan.totalk)
        rows, columns = min(plan.h, m), min(plan.w, m)
        per_total, per_size = (rows + self._named + 8) * 2.0**-24, 0.0
        if self._is_vector:
            per_total = (max(rows, columns) + self._named + 8) * 2.0**-24
        else:
            right = _tables(plan.w, plan.device)
            reach = min(columns, right.reach)
            per_size = reach * (2.0**-18 + (columns + 8) * 2.0**-24)
            per_size += min(256 * columns, right.low_reach) * 2.0**-27
        # 1.01 for products of errors, those of magnitudes included, and for this bound's own.
        limits = torch.where(total > 0, total * (1.01 * per_total) + 1.01 * m / 4, -1.0)
        if self._is_low_rank:  # a column's sum of magnitudes bounds those of `B_h C / 2^18`
            sums = total.new_zeros(len(total), plan.w)
            sums.scatter_add_(1, self._column, self.share.abs())
            limits.add_(sums.amax(1, keepdim=True), alpha=1.01 * per_size)
            per_size = 0.0
        return limits, 1.01 * per_size


def _chunks_at_once(plan: ChunkPlan) -> int:
    if plan.device.type != "cpu":
        return max(1, plan.chunks)
    return max(1, torch.get_num_threads() * _CACHED // plan.totalk)


def _rows_of_a_line(h: int, w: int) -> int:
    return max(rows for rows in range(1, max(1, _LINE // w) + 1) if h % rows == 0)


def _are_few(values: Tensor, count: Tensor) -> bool:
    """Float32 holds sums and means of these: signs of up to `_FEW` peers."""
    if values.dtype != torch.bool or values.numel() == 0:
        return False
    return values.shape[1] <= _FEW or (count.device.type == "cpu" and int(count.max()) <= _FEW)


def _mean(sums: Tensor, factor: float, count: Tensor | float) -> Tensor:
    """Coefficients in place of sums of `_integers`."""
    return (sums if factor == 1.0 else sums.mul_(factor)).div_(count).round_()


@dataclass(frozen=True)
class _Tables:
    """The basis of one side.

    Attributes:
        both: `hi(B)` beside `lo(B)`, float64.
        paired: by row `[[hi, lo], [0, hi]]`, `[n, 2, 2n]`.
        side: `B / 2^18`.
        minus: minus the same.
        rows: `side` transposed.
        minus_rows: `minus` transposed.
        high: `hi(B)`.
        low: `lo(B)`.
        reach: largest sum of magnitudes over a row of `side`.
        low_reach: the same of `low`.
    """

    both: Tensor
    paired: Tensor
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
    high, low = limbs(basis)
    both = torch.cat((high, low), 1)
    high, low = (part.to(_exact_dtype(n)) for part in (high, low))
    paired = torch.stack((torch.cat((high, low), 1), torch.cat((0 * high, high), 1)), 1)
    side = (basis * 2.0**-BITS).float()
    rows = side.t().contiguous()
    reach, low_reach = (float(t.abs().sum(1).max()) for t in (side, low))
    return _Tables(both, paired, side, -side, rows, -rows, high, low, reach, low_reach)


def _exact_dtype(terms: int) -> torch.dtype:
    """What holds sums of so many products of limbs."""
    return torch.float32 if terms <= 64 else torch.float64


def _integers(values: Tensor, are_few: bool) -> tuple[Tensor, float]:
    """Float32 where there are few, else float64, and the factor to coefficients.

    Products with the factor are halves away from zero where they would be halves: they round so.
    Means of signs are no halves, there not being 2^19 of them.
    """
    if values.dtype == torch.bool:
        signs = values.to(torch.float32 if are_few else torch.float64)
        return signs.mul_(-2 << BITS).add_(1 << BITS), 1.0
    return values.mul(_unit(values)).trunc_(), 2.0**-12 * (1 + 2.0**-49)


def _unit(values: Tensor) -> Tensor:
    """What makes integers of a chunk's values: `2^(156 - e)`, float64 `[n, 1]`."""
    largest = values.abs().amax(1, keepdim=True) if values.shape[1] else values.new_zeros(1, 1)
    exponent = (largest.float().view(torch.int32) >> 23).to(torch.int64)
    return exponent.neg_().add_(156 + 1023).bitwise_left_shift_(52).view(torch.float64)


def _split(index: Tensor, w: int) -> tuple[Tensor, Tensor]:
    """Row and column of flat indices."""
    if w & (w - 1) == 0:  # four times as fast
        return index >> (w.bit_length() - 1), index & (w - 1)
    row = index.div(w, rounding_mode="floor")
    return row, index.sub(row, alpha=w)


def exact_product(a_high: Tensor, a_low: Tensor, b_high: Tensor, b_low: Tensor) -> Tensor:
    """`P(A, B)` of limbs, in their dtype."""
    return (a_low @ b_high).add_(a_high @ b_low).add_(a_high @ b_high, alpha=LIMB)


def _exact_left(plan: ChunkPlan, c: Tensor) -> Tensor:
    """`P(B_h, C)` of dense coefficients `[n, h * w]`: float32 `[n * h, w]`."""
    left = _tables(plan.h, c.device)
    high, low = limbs(c.view(-1, plan.h, plan.w).to(left.high.dtype))
    return exact_product(left.high, left.low, high, low).float().view(-1, plan.w)


def _right(z: Tensor) -> Tensor:
    """Minus the sign of `P(Z, B_w^T)` for integers `[n, w]` of up to 18 bits, float32.

    `P(A, D)` is `A hi(D) + hi(A) lo(D)`, exact in float64; a rounding leaves the sign.
    """
    width = z.shape[1]
    right = _tables(width, z.device).both.t()
    z = z.double()
    x = z.mm(right[:width]).addmm_(z.div_(LIMB).round_(), right[width:])
    return x.neg_().sign_().float()


def _in_18_bits(z: Tensor) -> Tensor:
    """Rows of integers in float32, each by a power of two of its own, rounded."""
    largest = z.abs().amax(1, keepdim=True).clamp_(min=1.0).view(torch.int32)
    exponent = (largest >> 23).neg_().add_(127 + BITS - 1)  # of the power
    return z.mul(exponent.add_(127).bitwise_left_shift_(23).view(torch.float32)).round_()
