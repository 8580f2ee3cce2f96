"""The chunked orthonormal DCT as two matrix products (DeMo, arXiv 2411.19870, section 4)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from psyche_fast.kernels.plan import ChunkPlan
from psyche_fast.kernels.reference.workspace import ROWS, scratch


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


def forward(plan: ChunkPlan, chunks: Tensor, out: Tensor) -> None:
    """Coefficients `F_h^T X F_w` of chunks `[n, h, w]` (contiguous) into `out`, `[n, h * w]`."""
    if not plan.is_transformed:
        out.view(chunks.shape).copy_(chunks)
        return
    _sandwich(plan.rows_h, chunks, plan.basis_w, out.view(chunks.shape))


def inverse(plan: ChunkPlan, coefficients: Tensor, out: Tensor) -> None:
    """Chunks `F_h C F_w^T` into `out`, `[n, h, w]`, of coefficients `[n, h * w]` (contiguous)."""
    if not plan.is_transformed:
        out.copy_(coefficients.view(out.shape))
        return
    _sandwich(plan.basis_h, coefficients.view(out.shape), plan.rows_w, out)


def _sandwich(left: Tensor, x: Tensor, right: Tensor, out: Tensor) -> None:
    """`left @ x @ right` for `x` `[n, h, w]` into `out`, both contiguous."""
    n, h, w = x.shape
    if h == 1:
        torch.mm(x.view(n, w), right, out=out.view(n, w))
    elif w == 1:
        torch.mm(x.view(n, h), left.t(), out=out.view(n, h))
    else:  # batches of small products are faster than one tall product
        rows = torch.bmm(x, right.expand(n, w, w), out=scratch(ROWS, (n, h, w), x))
        torch.bmm(left.expand(n, h, h), rows, out=out)
