"""Sharded parameters (DTensor: FSDP2, tensor parallelism) in their plain form.

State and results cover the whole parameter on every rank: gradients are gathered, the arithmetic is
repeated by every rank of the mesh, and each takes its shard of the sign update. Everything that
knows about DTensor is in this file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def full_gradient(parameter: Tensor) -> Tensor | None:
    """The gradient of the whole parameter or None; a collective for sharded parameters."""
    gradient = parameter.grad
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


def local_tensor(parameter: Tensor) -> Tensor:
    """The part of a parameter that this rank holds, sharing its memory."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def signed_update(
    parameters: Sequence[Tensor],
    learning_rate: float,
    update: Callable[[Sequence[Tensor], Sequence[float]], None],
) -> None:
    """Run an update of the form `parameter -= learning_rate * sign` on shards too.

    A plain parameter is its own target. A sharded one gets a whole tensor of zeros and the rate -1,
    which leaves the sign itself there; the shard of it is then subtracted from the local part by
    the same arithmetic.

    Args:
        parameters: plain tensors or DTensors.
        learning_rate: the rate.
        update: subtracts in place, one target and rate per parameter.
    """
    targets, rates = [], []
    for p in parameters:
        sharded = isinstance(p, DTensor)
        targets.append(torch.zeros(p.shape, dtype=p.dtype, device=p.device) if sharded else p)
        rates.append(-1.0 if sharded else learning_rate)
    update(targets, rates)
    for p, target in zip(parameters, targets, strict=True):
        if isinstance(p, DTensor):
            # src_data_rank=None: every rank holds the same whole tensor, so cutting it needs no
            # communication.
            shard = distribute_tensor(target, p.device_mesh, p.placements, src_data_rank=None)
            wide = torch.float64 if p.dtype == torch.float64 else torch.float32
            p.to_local().sub_(shard.to_local().to(wide), alpha=learning_rate)
