"""Sums of gradients and squared norms of any number of tensors, one launch.

A persistent grid walks a table of blocks. A block belongs to one tensor, whose row in the table of
tensors tells the addresses (so that tensors of any size and dtype share a launch) and what to do:
read the gradient, read the sum, both. Every block leaves the sum of its squares in a slot of its
own, and the slots of a group lie side by side in an order that depends on sizes only: the norm is
the same bits on every run, whatever the number of programs.
"""

from __future__ import annotations

import itertools
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from psyche_fast.kernels.accumulate import GRADIENT_DTYPES, AccumulationPlan
from psyche_fast.kernels.triton.launch import (
    current_stream,
    launch_options,
    on_device,
    programs,
    written,
)

BLOCK = 4096
PART = 1024

_READ_GRADIENT, _READ_SUM, _ALIGNED = 1, 2, 4
_DTYPE_SHIFT = 3
_FIELDS = tl.constexpr(5)  # gradient's address, sum's address, elements, first block, flags
_TABLES_KEPT = 64
"""Tables of pointers kept per plan: one per micro-batch of a step where addresses recur."""


@triton.jit
def _load(address, start, at, mask, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """float32 values at an address, 0 where masked."""
    pointer = address.to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return tl.load(pointer + start + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _gradient(address, start, at, mask, dtype, DTYPES: tl.constexpr, ALIGNED: tl.constexpr):
    """float32 values of a tensor whose dtype is one of the bit set `DTYPES`, by number."""
    if DTYPES == 1:
        values = _load(address, start, at, mask, tl.bfloat16, ALIGNED)
    elif DTYPES == 2:
        values = _load(address, start, at, mask, tl.float16, ALIGNED)
    elif DTYPES == 4:
        values = _load(address, start, at, mask, tl.float32, ALIGNED)
    else:
        # A load whose mask is empty costs an instruction; a branch would cost registers.
        values = _load(address, start, at, mask & (dtype == 2), tl.float32, ALIGNED)
        if DTYPES & 1:
            values += _load(address, start, at, mask & (dtype == 0), tl.bfloat16, ALIGNED)
        if DTYPES & 2:
            values += _load(address, start, at, mask & (dtype == 1), tl.float16, ALIGNED)
    return values


@triton.jit
def _part(
    row, start, left, flags,
    DTYPES: tl.constexpr, SUMS: tl.constexpr, NORM: tl.constexpr, SIZE: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """Sum of the squares of `SIZE` elements, 0 unless `NORM`; with `SUMS` they are summed up."""
    # Rows of 4 give every thread 4 neighbours whatever the dtype (16 bytes of float32), so that
    # loads and stores share one layout and nothing goes through shared memory.
    at = tl.arange(0, SIZE // 4)[:, None] * 4 + tl.arange(0, 4)[None, :]
    flags = tl.full([SIZE // 4, 4], flags, tl.int32)
    has_gradient = (flags & 1) != 0
    has_sum = (flags & 2) != 0
    if not ALIGNED:
        has_gradient = has_gradient & (at < left)
        has_sum = has_sum & (at < left)
    values = _gradient(tl.load(row), start, at, has_gradient, flags >> 3, DTYPES, ALIGNED)
    if SUMS:
        address = tl.load(row + 1)
        # A mask that no lane passes costs no memory traffic: the first micro-batch reads no sum.
        values += _load(address, start, at, has_sum, tl.float32, ALIGNED)
        pointer = address.to(tl.pointer_type(tl.float32))
        if ALIGNED:
            pointer = tl.multiple_of(pointer, 16)
        tl.store(pointer + start + at, values, mask=has_gradient)
    squares = 0.0
    if NORM:
        squares = tl.sum(values * values)
    return squares


@triton.jit
def accumulate_blocks(
    tensors, block_tensor, partials, blocks,
    DTYPES: tl.constexpr, SUMS: tl.constexpr, NORM: tl.constexpr, BLOCK: tl.constexpr,
    PART: tl.constexpr,
):  # fmt: skip
    """`sum (+)= gradient`, and the sum of squares of each block.

    Args:
        tensors: int64 `[tensors, _FIELDS]`.
        block_tensor: int32 `[blocks]`, row in `tensors`.
        partials: float32 `[blocks]`; written with `NORM`.
        blocks: number of blocks.
        DTYPES: bit set of the gradients' dtypes, numbered as `GRADIENT_DTYPES`.
        SUMS: there are sums to be read and written; else only `NORM` is of use.
        NORM: write the sums of squares.
        BLOCK: elements of a block.
        PART: how many of them go at once where addresses are not aligned or a tensor ends.
    """
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        row = tensors + tl.load(block_tensor + block).to(tl.int64) * _FIELDS
        start = (block - tl.load(row + 3)) * BLOCK
        left = tl.load(row + 2) - start
        flags = tl.load(row + 4).to(tl.int32)
        squares = 0.0
        if (flags & 3) != 0:
            if ((flags & 4) != 0) & (left >= BLOCK):
                squares += _part(row, start, left, flags, DTYPES, SUMS, NORM, BLOCK, True)
            else:
                # In parts, so that the addresses and masks of this rare case decide neither the
                # registers nor the occupancy of the other one.
                for part in range(0, tl.minimum(left, BLOCK).to(tl.int32), PART):
                    squares += _part(
                        row, start + part, left - part, flags, DTYPES, SUMS, NORM, PART, False
                    )
        if NORM:
            tl.store(partials + block, squares)


class _Tables:
    """What a plan's launches read: blocks, and tensors by their addresses."""

    def __init__(self, plan: AccumulationPlan) -> None:
        block = BLOCK
        counts = [-(-numel // block) for numel in plan.numels]
        # Stable: within a group in the plan's order.
        order = sorted(range(len(counts)), key=lambda number: plan.groups[number])
        self.first = [0] * len(counts)
        ends = [0] * plan.group_count
        blocks = 0
        for number in order:
            self.first[number] = blocks
            blocks += counts[number]
            ends[plan.groups[number]] = blocks
        self.blocks = blocks
        self.segments = list(itertools.pairwise([0, *ends]))
        ordered = torch.tensor(order, dtype=torch.int32)
        repeats = torch.tensor([counts[number] for number in order], dtype=torch.int64)
        self.block_tensor = _upload(torch.repeat_interleave(ordered, repeats), plan.device)
        self._numels = plan.numels
        self._device = plan.device
        self._kept: OrderedDict[tuple[tuple[int, int, int], ...], Tensor] = OrderedDict()

    def tensors(self, rows: tuple[tuple[int, int, int], ...]) -> Tensor:
        """The table of tensors on the device, from (gradient's address, sum's address, flags)."""
        table = self._kept.get(rows)
        if table is None:
            fields = [
                (gradient, total, numel, first, flags)
                for (gradient, total, flags), numel, first in zip(
                    rows, self._numels, self.first, strict=True
                )
            ]
            table = _upload(torch.tensor(fields, dtype=torch.int64), self._device)
            self._kept[rows] = table
            if len(self._kept) > _TABLES_KEPT:
                self._kept.popitem(last=False)
        else:
            self._kept.move_to_end(rows)
        return table


# By stream, since none waits for what another one uploads.
_tables: weakref.WeakKeyDictionary[AccumulationPlan, dict[Any, _Tables]] = (
    weakref.WeakKeyDictionary()
)


def accumulate(
    plan: AccumulationPlan,
    sums: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    fresh: Sequence[bool],
    squares: bool,
) -> Tensor | None:
    """See `psyche_fast.kernels.accumulate.accumulate`; gradients are contiguous."""
    rows = []
    for total, gradient, new in zip(sums, gradients, fresh, strict=True):
        # What got no gradient is looked at for its squares only.
        read_sum = not new and (squares or gradient is not None)
        rows.append(_row(gradient, total, read_sum))
    result = _launch(plan, tuple(rows), _dtypes(gradients), sums=True, norm=squares)
    written(*(s for s, gradient in zip(sums, gradients, strict=True) if gradient is not None))
    return result


def squared_norms(plan: AccumulationPlan, tensors: Sequence[Tensor | None]) -> Tensor:
    """See `psyche_fast.kernels.accumulate.squared_norms`; tensors are contiguous."""
    rows = tuple(_row(tensor, None, False) for tensor in tensors)
    result = _launch(plan, rows, _dtypes(tensors), sums=False, norm=True)
    assert result is not None
    return result


def _row(gradient: Tensor | None, total: Tensor | None, read_sum: bool) -> tuple[int, int, int]:
    source = 0 if gradient is None else gradient.data_ptr()
    target = 0 if total is None else total.data_ptr()
    flags = _READ_SUM if read_sum else 0
    if gradient is not None:
        flags |= _READ_GRADIENT | GRADIENT_DTYPES.index(gradient.dtype) << _DTYPE_SHIFT
    if (source | target) % 16 == 0:
        flags |= _ALIGNED
    return source, target, flags


def _dtypes(tensors: Sequence[Tensor | None]) -> int:
    present = {t.dtype for t in tensors if t is not None}
    # Without any gradient the dtype is of no account: none is read.
    return sum(1 << GRADIENT_DTYPES.index(dtype) for dtype in present) or 1


def _launch(
    plan: AccumulationPlan,
    rows: tuple[tuple[int, int, int], ...],
    dtypes: int,
    *,
    sums: bool,
    norm: bool,
) -> Tensor | None:
    by_stream, stream = _tables.setdefault(plan, {}), current_stream(plan.device)
    tables = by_stream.get(stream)
    if tables is None:
        tables = by_stream[stream] = _Tables(plan)
    if tables.blocks == 0:
        return torch.zeros(plan.group_count, device=plan.device) if norm else None
    partials = torch.empty(tables.blocks if norm else 1, device=plan.device)
    options, own = launch_options("accumulate", plan.device)
    grid = (programs(plan.device, own["ctas_per_sm"], tables.blocks),)
    with on_device(plan.device):
        accumulate_blocks[grid](
            tables.tensors(rows),
            tables.block_tensor,
            partials,
            tables.blocks,
            DTYPES=dtypes,
            SUMS=sums,
            NORM=norm,
            BLOCK=BLOCK,
            PART=PART,
            **options,
        )
    if not norm:
        return None
    totals = [partials[a:b].sum(dtype=torch.float64) for a, b in tables.segments]
    return torch.stack(totals).float()


def _upload(table: Tensor, device: torch.device) -> Tensor:
    if device.type == "cpu":
        return table
    return table.pin_memory().to(device, non_blocking=True)
