"""What tests of models share: one rank's part of a model, and the gradients that it gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from psyche_fast.batch import Batch
from psyche_fast.models import CausalLM, load_model
from psyche_fast.models.source import resolve_model
from psyche_fast.rank.topology import Topology


def load(folder: Path, topology: Topology | None = None, **options: Any) -> CausalLM:
    """This rank's part, in fp32 on the CPU."""
    topology = topology or Topology()
    return load_model(
        resolve_model(str(folder)),
        device=torch.device("cpu"),
        param_dtype=torch.float32,
        shard_mesh=topology.shard_mesh,
        tensor_mesh=topology.tensor_mesh,
        group=topology.copy,
        **options,
    )


def gradients(model: CausalLM, batch: Batch) -> dict[str, Tensor]:
    """The loss, under no name, and every whole gradient; a collective where the model is split."""
    model.train()
    model.module.zero_grad()
    loss = model.loss(batch)
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters().items() if p.grad is not None}
    whole = {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in grads.items()}
    return {"": loss.detach(), **{n: g.clone() for n, g in whole.items()}}
