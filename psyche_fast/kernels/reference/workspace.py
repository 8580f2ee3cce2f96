"""Buffers for intermediate results, kept from call to call.

Fresh temporaries of several MB come from the kernel page by page, and go back when they are freed:
whether they do depends on the allocator's history, and costs a step of DeMo on a CPU up to half its
time again.
"""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

_local = threading.local()

ROWS, RESULT, DENSE, LEFT, RIGHT = range(5)
"""Slots: row products, what a transform returns, dense coefficients, factors of a product."""


def scratch(slot: int, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """A contiguous tensor of unspecified content, valid until the slot is taken again.

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
