"""The linear outer step in plain PyTorch, slice by slice."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from psyche_fast.kernels.outer import Local
from psyche_fast.kernels.plan import ChunkPlan, Entries
from psyche_fast.kernels.reference.decode import Decoder
from psyche_fast.kernels.reference.transform import ieee_matmul
from psyche_fast.kernels.reference.update import chunk_views, parameter_views
from psyche_fast.kernels.reference.workspace import RESULT, groups, scratch


def outer(
    plan: ChunkPlan,
    shared: Sequence[Tensor],
    received: Entries | Tensor,
    length: float,
    replicas: int | None,
    momenta: Sequence[Tensor] | None,
    momentum: float,
    local: Local | None,
) -> None:
    """See `psyche_fast.kernels.outer.outer`."""
    with ieee_matmul():
        for group in groups(plan):
            decoder = None
            if isinstance(received, Entries):
                first, last = group[0].start, group[-1].stop
                decoder = Decoder(plan, received, first, last, replicas)
            for part in group:
                if decoder is not None:
                    mean, is_own = decoder.chunks(part.start, part.stop), True
                else:
                    assert isinstance(received, Tensor)
                    mean = _mean(plan, received[:, part.start : part.stop])
                    is_own = len(received) > 1
                means = chunk_views(plan, part, mean)
                targets = parameter_views(plan, part, shared)
                if momenta is not None:
                    u = parameter_views(plan, part, momenta)
                    torch._foreach_mul_(u, momentum)
                    torch._foreach_add_(u, means)
                    if is_own:
                        torch._foreach_add_(means, u, alpha=momentum)
                    else:
                        means = list(torch._foreach_add(means, u, alpha=momentum))
                torch._foreach_add_(targets, means, alpha=-length)
                if local is not None:
                    own = parameter_views(plan, part, local.tensors)
                    since = None
                    if local.since is not None:
                        since = parameter_views(plan, part, local.since)
                    _mix(own, targets, local.mix, since)


def _mean(plan: ChunkPlan, values: Tensor) -> Tensor:
    """The mean of values `[replicas, n, h * w]`, added up in their order; of one its own."""
    if len(values) == 1:
        return values[0].view(-1, plan.h, plan.w)
    total = scratch(RESULT, values.shape[1:], values)
    torch.add(values[0], values[1], out=total)
    for value in values[2:]:
        total += value
    return total.mul_(1.0 / len(values)).view(-1, plan.h, plan.w)


def _mix(
    own: Sequence[Tensor], shared: Sequence[Tensor], mix: float, since: Sequence[Tensor] | None
) -> None:
    if since is not None:
        torch._foreach_sub_(list(own), list(since))
        torch._foreach_add_(list(own), list(shared))
    elif mix == 0.0:
        torch._foreach_copy_(list(own), list(shared))
    else:
        torch._foreach_mul_(list(own), mix)
        torch._foreach_add_(list(own), list(shared), alpha=1.0 - mix)
