"""Buffers for intermediate results, kept from call to call, and what is worked on at once.

Fresh temporaries of several MB come from the kernel page by page, and go back when they are freed:
whether they do depends on the allocator's history, and costs a step of DeMo on a CPU up to half its
time again.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from psyche_fast.kernels.plan import ChunkPlan, Slice

_local = threading.local()

# Elements of a group of slices. Slices are cut so that a slice's chunks, rows and coefficients stay
# in the cores' own caches from one operation to the next; ranking and gathering work on rows that
# are far shorter, and are done for a group at a time lest their calls cost more than their work.
_GROUP_ELEMENTS = 1 << 21

ROWS, RESULT, DENSE, LEFT, RIGHT, COEFFICIENTS = range(6)
"""Slots: row products or magnitudes, decoded chunks, dense coefficients, factors of a product, a
group's coefficients."""
SUMS, COUNTS, MAGNITUDES, LEAST, LIMBS = range(6, 11)
"""Those of `direction.py`: sums of entries and how many they are, magnitudes, the smallest of them,
coefficients in two parts."""


def scratch(slot: int, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """A contiguous tensor of unspecified content, valid until the slot is used again.

    Args:
        slot: which buffer; two that are in use at once need two slots.
        shape: of the result.
        like: for dtype and device.
    """
    if like.device.type != "cpu":  # an accelerator's allocator keeps its memory by itself
        return torch.empty(shape, dtype=like.dtype, device=like.device)
    buffers: dict[tuple[int, torch.dtype, torch.device], Tensor]
    buffers = _local.__dict__.setdefault("buffers", {})
    key = (slot, like.dtype, like.device)
    size = math.prod(shape)
    buffer = buffers.get(key)
    if buffer is None or buffer.numel() < size:
        buffer = buffers[key] = torch.empty(size, dtype=like.dtype, device=like.device)
    return buffer[:size].view(shape)


def groups(plan: ChunkPlan, chunk_elements: int | None = None) -> Iterator[list[Slice]]:
    """The plan's slices in order, in groups of bounded size.

    Args:
        plan: the class.
        chunk_elements: what is held of a chunk; all of it where None.
    """
    limit = max(1, _GROUP_ELEMENTS // max(1, chunk_elements or plan.totalk))
    group: list[Slice] = []
    for part in plan.slices:
        if group and part.stop - group[0].start > limit:
            yield group
            group = []
        group.append(part)
    if group:
        yield group
