"""Cross-entropy of rows of logits, and its gradient in their memory where there are kernels.

The logits of one row are read twice, once for the normaliser and once for the gradient, which takes
their place: 6 bytes a logit in bfloat16, where single operations move about 46 (Liger-Kernel, arXiv
2410.10989, section 3.2). All arithmetic is in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from psyche_fast.kernels.backends import implementation


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    gradient: bool = True,
    backend: str = "torch",
) -> tuple[Tensor, Tensor | None]:
    """Sum of the rows' cross-entropies, and its gradient by the logits, which are used up.

    Args:
        logits: `[N, V]`, contiguous, floating point.
        targets: int64 `[N]`.
        ignore_index: target of rows that do not count, and have no gradient.
        gradient: whether it is wanted.
        backend: a resolved backend's name.

    Returns:
        The sum, float32 and 0-d, and the gradient `[N, V]`: float32 (`"torch"`), or of the logits'
        dtype and in their memory (kernels); None if it is not wanted.
    """
    assert logits.is_contiguous() and targets.shape == logits.shape[:1]
    assert targets.dtype == torch.int64
    result: tuple[Tensor, Tensor | None] = implementation(backend, "cross_entropy").cross_entropy(
        logits, targets, ignore_index, gradient
    )
    return result
