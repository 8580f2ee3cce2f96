"""Cross-entropy without the logits: the head's product and its loss, some rows at a time.

The logits of 16k tokens and a vocabulary of 128k are 8.4 GB in fp32, and their gradient as much
again. Here the gradients of hidden states and head are computed beside the loss, for one chunk of
rows after the other, so that nothing of a chunk outlives it and nothing is computed twice
(Liger-Kernel, arXiv 2410.10989, section 3.2).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from psyche_fast.batch import IGNORE
from psyche_fast.kernels.backends import resolve_backend
from psyche_fast.kernels.cross_entropy import cross_entropy

_CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}
"""fp32 logits of a chunk: large enough for the matrix units (on a GPU 1,024 rows of 128k)."""

PLAIN_BYTES = 256 << 20
"""fp32 logits of a micro-batch up to which `auto` computes them whole: they are small then beside
what a step holds anyway."""


def plain_bytes(device_type: str) -> int:
    """The same on a kind of device: a CPU is faster with chunks wherever there are several."""
    return min(PLAIN_BYTES, _CHUNK_BYTES["cpu"]) if device_type == "cpu" else PLAIN_BYTES


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
    ) -> Tensor:
        wants = ctx.needs_input_grad[:3]
        rows, device = hidden.shape[0], hidden.device
        size = _rows_at_once(device.type, weight.shape[0])
        total = torch.zeros((), device=device)
        # fp32: the incoming gradient scales them before they are rounded, once.
        grads = [
            torch.zeros(t.shape, device=device) if want and t is not None else None
            for t, want in zip((hidden, weight, bias), wants, strict=True)
        ]
        wide = weight.float() if wants[0] and device.type != "cuda" else weight
        backend = resolve_backend("auto", device) if device.type == "cuda" else "torch"
        for start in range(0, rows, size):
            h, target = hidden[start : start + size], targets[start : start + size]
            logits = F.linear(h, weight, bias)
            loss, gradient = cross_entropy(
                logits, target, ignore_index=IGNORE, gradient=any(wants), backend=backend
            )
            total += loss
            if gradient is None:
                continue
            if grads[2] is not None:
                grads[2] += gradient.sum(0, dtype=torch.float32)
            if device.type == "cuda":
                gradient = gradient.to(h.dtype)  # as autograd hands it to the product
                if grads[0] is not None:
                    grads[0][start : start + size] = _product(gradient, weight)
                if grads[1] is not None:
                    grads[1] += _product(gradient.t(), h)
            else:
                with _products_of(h.dtype):
                    if grads[0] is not None:
                        torch.mm(gradient, wide, out=grads[0][start : start + size])
                    if grads[1] is not None:
                        grads[1].addmm_(gradient.t(), h.float())
        ctx.dtypes = [None if t is None else t.dtype for t in (hidden, weight, bias)]
        ctx.save_for_backward(*grads)
        return total

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grads = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return (*(None if g is None else (g * incoming).to(dtype) for g, dtype in grads), None)


def _rows_at_once(device_type: str, vocabulary: int) -> int:
    return max(_CHUNK_BYTES.get(device_type, 64 << 20) // (4 * vocabulary), 64)


def chunk_bytes(device_type: str, rows: int, weight: Tensor) -> int:
    """What the loss of so many rows holds at most for one chunk, the gradients apart.

    On a GPU the logits, in whose place their gradient is, and a product for the head's gradient.
    """
    vocabulary, hidden = weight.shape
    logits = min(rows, _rows_at_once(device_type, vocabulary)) * vocabulary
    if device_type == "cuda":
        return logits * weight.dtype.itemsize + 4 * vocabulary * hidden
    return logits * (weight.dtype.itemsize + 8)


def _product(one: Tensor, other: Tensor) -> Tensor:
    """A matrix product on a GPU, in fp32 whatever the factors' type."""
    return (
        one @ other if one.dtype == torch.float32 else torch.mm(one, other, out_dtype=torch.float32)
    )


@contextmanager
def _products_of(dtype: torch.dtype) -> Iterator[None]:
    """Within, a CPU multiplies fp32 tensors as if rounded to `dtype`, where it can.

    That is the only way to bf16 products of which the sums are fp32, and twice as fast.
    """
    knob = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    saved = knob.fp32_precision
    if dtype == torch.bfloat16:
        knob.fp32_precision = "bf16"
    try:
        yield
    finally:
        knob.fp32_precision = saved


def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
) -> Tensor:
    """Sum of the cross-entropies of `softmax(hidden weight^T + bias)`, without whole logits.

    Args:
        hidden: `[N, H]`.
        weight: `[V, H]`, of the same dtype.
        bias: `[V]`, or None.
        targets: int64 `[N]`; rows of -100 do not count.

    Returns:
        fp32, 0-d. Gradients of the first order only.
    """
    result: Tensor = _HeadLoss.apply(hidden, weight, bias, targets)
    return result


@contextmanager
def instead_of_logits(head: nn.Linear, targets: Tensor) -> Iterator[None]:
    """Within, the head gives the sum of the losses as logits `[1, 1, 1]`.

    In the head's forward, where FSDP2 has its weight whole.

    Args:
        head: the model's.
        targets: int64, one for each of the rows that the head is given.
    """

    def forward(hidden: Tensor) -> Tensor:
        rows = hidden.reshape(-1, hidden.shape[-1])
        return chunked_cross_entropy(rows, head.weight, head.bias, targets).view(1, 1, 1)

    head.forward = forward  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del head.forward


@contextmanager
def marked_logits(head: nn.Linear) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Within, the head gives logits that anything done to them changes.

    Yields a list of what it gave: the tensors, and copies.
    """
    given: list[tuple[Tensor, Tensor]] = []

    def forward(hidden: Tensor) -> Tensor:
        shape = (*hidden.shape[:-1], head.weight.shape[0])
        marks = torch.arange(math.prod(shape), device=hidden.device)
        # Of both signs, 2^-10 to 2^10 in size: capping, scaling, shifting and masking all show.
        logits = torch.where(marks % 2 == 0, 1.0, -1.0) * 2.0 ** (marks % 21 - 10)
        logits = logits.to(hidden.dtype).view(shape)
        given.append((logits, logits.clone()))
        return logits

    head.forward = forward  # type: ignore[method-assign, assignment]
    try:
        yield given
    finally:
        del head.forward
