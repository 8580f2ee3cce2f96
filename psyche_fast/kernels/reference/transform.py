"""The chunked orthonormal DCT as two matrix products (DeMo, arXiv 2411.19870, section 4)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from psyche_fast.kernels.plan import ChunkPlan
from psyche_fast.kernels.reference.workspace import RESULT, ROWS, scratch


@contextmanager
def ieee_matmul() -> Iterator[None]:
    """Full float32 products, whatever the process has set.

    Products in tf32 or bf16 would change which coefficients are kept.
    """
    knobs = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    saved = [knob.fp32_precision for knob in knobs]
    try:
        for knob in knobs:
            knob.fp32_precision = "ieee"
        yield
    finally:
        for knob, value in zip(knobs, saved, strict=True):
            knob.fp32_precision = value


def forward(plan: ChunkPlan, chunks: Tensor) -> Tensor:
    """Coefficients `F_h^T X F_w` of chunks `[n, h, w]` (contiguous), as `[n, h * w]`.

    They lie in the slot `RESULT` and are good until the next transform.
    """
    return _sandwich(chunks, plan.basis_h.t(), plan.basis_w).view(-1, plan.totalk)


def inverse(plan: ChunkPlan, coefficients: Tensor) -> Tensor:
    """Chunks `F_h C F_w^T`, `[n, h, w]`, of coefficients `[n, h * w]` (contiguous).

    They lie in the slot `RESULT` and are good until the next transform.
    """
    chunks = coefficients.view(-1, plan.h, plan.w)
    return _sandwich(chunks, plan.basis_h, plan.basis_w.t())


def _sandwich(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """`left @ x @ right` for `x` `[n, h, w]`; the rows of all chunks go through one product."""
    n, h, w = x.shape
    result = scratch(RESULT, (n, h, w), x)
    if w == 1:
        torch.mm(x.view(n, h), left.t(), out=result.view(n, h))
        return result
    rows = result if h == 1 else scratch(ROWS, (n, h, w), x)
    torch.mm(x.view(n * h, w), right, out=rows.view(n * h, w))
    if h > 1:
        torch.bmm(left.expand(n, h, h), rows, out=result)
    return result
