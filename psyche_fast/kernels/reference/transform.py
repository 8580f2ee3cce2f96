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
    """Coefficients of chunks `[n, h, w]` (contiguous), column by column.

    Args:
        plan: the chunk class.
        chunks: the chunks `X`.
        out: `[n, w, h]`, contiguous: takes `(F_h^T X F_w)^T = F_w^T X^T F_h`.
    """
    _sandwich(plan.rows_w, chunks.transpose(1, 2), plan.basis_h, out)


def inverse(plan: ChunkPlan, coefficients: Tensor, out: Tensor) -> None:
    """Chunks `F_h C F_w^T` into `out`, `[n, h, w]`, of coefficients `[n, h * w]` (contiguous)."""
    _sandwich(plan.basis_h, coefficients.view(out.shape), plan.rows_w, out)


def _sandwich(left: Tensor, x: Tensor, right: Tensor, out: Tensor) -> None:
    """`left @ x @ right` for `x` `[n, a, b]` into `out`, contiguous."""
    n, a, b = x.shape
    if a == 1:
        torch.mm(x.reshape(n, b), right, out=out.view(n, b))
    elif b == 1:
        torch.mm(x.reshape(n, a), left.t(), out=out.view(n, a))
    else:  # batches of small products run faster here than one tall product
        half = torch.bmm(x, right.expand(n, b, b), out=scratch(ROWS, (n, a, b), x))
        torch.bmm(left.expand(n, a, a), half, out=out)
