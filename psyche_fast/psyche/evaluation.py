"""What can be done with a model that has no trainer: forward, and rounding."""

from __future__ import annotations

import torch
from torch import Tensor

from psyche_fast.batch import Batch
from psyche_fast.models import CausalLM
from psyche_fast.rank.gradients import local_parts
from psyche_fast.rank.topology import Topology


@torch.no_grad()
def forward(
    model: CausalLM,
    place: Topology,
    batch: Batch,
    *,
    num_logits_to_keep: int | None = None,
    loss_scale: float | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Forward without gradient, each dp rank on its rows.

    Args:
        model: this rank's model.
        place: this rank's place.
        batch: the whole batch, the same on every rank.
        num_logits_to_keep: only the last so many positions' logits.
        loss_scale: the loss is divided by it.

    Returns:
        logits of this rank's rows and, where the batch has labels, their loss.

    Raises:
        ValueError: a malformed batch.
    """
    mine = model.prepare(batch).pad_rows(place.dp).share(place.shard, place.dp)
    was_training = model.module.training
    model.eval()
    try:
        return model.forward(mine, num_logits_to_keep=num_logits_to_keep, loss_scale=loss_scale)
    finally:
        if was_training:
            model.train()


@torch.no_grad()
def truncate_bf16(model: CausalLM) -> None:
    """Rounds the parameters to bfloat16 in place."""
    for part in local_parts(model.named_parameters()).values():
        part.copy_(part.to(torch.bfloat16))
