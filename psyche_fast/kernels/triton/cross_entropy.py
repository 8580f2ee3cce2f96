"""Cross-entropy of rows of logits and its gradient in their place, one program for each row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from psyche_fast.kernels.triton.launch import launch_options, on_device, written

NEIGHBOURS = tl.constexpr(8)
"""Logits that a thread reads at once: 16 bytes of bfloat16."""


@triton.jit
def cross_entropy_rows(
    logits, targets, losses, V,
    IGNORED: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row's cross-entropy; with GRADIENT, softmax minus one-hot over its logits.

    Args:
        logits: `[N, V]`.
        targets: int64 `[N]`, IGNORED for rows that do not count.
        losses: float32 `[N]`, written.
        V: size of the vocabulary.
        BLOCK: logits that are handled at once, no fewer than there are threads.
    """
    row = tl.program_id(0).to(tl.int64)
    at = logits + row * V
    # Neighbours are of one thread, which goes over to a new largest once for all of them.
    lanes = tl.arange(0, BLOCK // NEIGHBOURS)[:, None]
    columns = lanes * NEIGHBOURS + tl.arange(0, NEIGHBOURS)[None, :]
    target = tl.load(targets + row)
    counts = target != IGNORED
    # Largest so far, and sum of the exponentials beside it: of each lane, joined at the end.
    most = tl.full([BLOCK // NEIGHBOURS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK // NEIGHBOURS], tl.float32)
    for first in range(0, V, BLOCK):
        inside = first + columns < V
        x = tl.load(at + first + columns, mask=inside, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(most, tl.max(x, 1))
        # A lane that has seen nothing but -inf has no largest to subtract.
        base = tl.where(larger == float("-inf"), 0.0, larger)
        total = total * tl.exp(most - base) + tl.sum(tl.exp(x - base[:, None]), 1)
        most = larger
    largest = tl.max(most, 0)
    total = tl.sum(total * tl.exp(most - largest), 0)
    normaliser = largest + tl.log(total)
    wanted = tl.load(at + target, mask=counts, other=0.0).to(tl.float32)
    tl.store(losses + row, tl.where(counts, normaliser - wanted, 0.0))
    if GRADIENT:
        # What is stored below is what has been read here, by other threads too.
        tl.debug_barrier()
        for first in range(0, V, BLOCK):
            inside = first + columns < V
            x = tl.load(at + first + columns, mask=inside, other=float("-inf")).to(tl.float32)
            g = tl.exp(x - normaliser) - (first + columns == target).to(tl.float32)
            g = tl.where(counts, g, 0.0)
            tl.store(at + first + columns, g.to(logits.dtype.element_ty), mask=inside)


def cross_entropy(
    logits: Tensor, targets: Tensor, ignore_index: int, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """See `psyche_fast.kernels.cross_entropy.cross_entropy`."""
    rows, size = logits.shape
    losses = torch.empty(rows, device=logits.device)
    if rows:
        options, own = launch_options("cross_entropy", logits.device)
        with on_device(logits.device):
            cross_entropy_rows[(rows,)](
                logits, targets.contiguous(), losses, size, IGNORED=ignore_index, GRADIENT=gradient,
                BLOCK=own["block"], **options,
            )  # fmt: skip
        written(logits)
    return losses.sum(), logits if gradient else None
