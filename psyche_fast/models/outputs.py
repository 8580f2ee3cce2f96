"""What a model's forward returns: an object, a dict or a tuple."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from psyche_fast.batch import IGNORE


def field(output: Any, name: str) -> Tensor:
    """One of a forward's results.

    Args:
        output: an object or a mapping with `loss` and `logits`, or a tuple of the two.
        name: which.

    Raises:
        ValueError: it is not there.
    """
    if isinstance(output, tuple):
        found = output[("loss", "logits").index(name)] if len(output) >= 2 else None
    elif isinstance(output, Mapping):
        found = output.get(name)
    else:
        found = getattr(output, name, None)
    if not isinstance(found, Tensor):
        raise ValueError(
            f"the model's forward returned no {name}: wanted an object or dict with loss and "
            "logits, or a tuple (loss, logits)"
        )
    return found


def targets_of(labels: Tensor) -> Tensor:
    """What each position predicts, `[B * L]`: labels are shifted, since logits would be copied."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE).flatten()


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum of the losses of logits `[B, L, V]` over the targets `[B * L]` that count, in fp32."""
    return F.cross_entropy(
        logits.flatten(0, 1).float(), targets, ignore_index=IGNORE, reduction="sum"
    )
