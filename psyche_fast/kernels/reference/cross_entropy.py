"""Cross-entropy of rows of logits by single operations."""

from __future__ import annotations

import torch
from torch import Tensor


def cross_entropy(
    logits: Tensor, targets: Tensor, ignore_index: int, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """See `psyche_fast.kernels.cross_entropy.cross_entropy`."""
    wide = logits.float()
    counts = (targets != ignore_index).unsqueeze(1)
    index = targets.where(counts.view(-1), 0).unsqueeze(1)
    normaliser = wide.logsumexp(1, keepdim=True)
    total = ((normaliser - wide.gather(1, index)) * counts).sum()
    if not gradient:
        return total, None
    found = wide.sub_(normaliser).exp_()
    found.scatter_add_(1, index, torch.full_like(normaliser, -1.0)).mul_(counts)
    return total, found
