"""AdamW inside `DeMo` and `DisTrO`: for norms, embeddings and whatever else is not compressed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.adamw import adamw

from psyche_fast.devices import message_for
from psyche_fast.sharding import local_gradient, local_tensor

BUCKET_ELEMENTS = 1 << 24
"""Gradient elements that are averaged at once, or those of one parameter."""


@dataclass(frozen=True)
class Moments:
    """A parameter with what AdamW keeps of it: this rank's part.

    Attributes:
        name: for messages.
        parameter: plain or distributed.
        group: the number of its parameter group.
        state: `exp_avg` and `exp_avg_sq` of the parameter's dtype, `step` float32, 0-d.
    """

    name: str
    parameter: Tensor
    group: int
    state: dict[str, Tensor]

    @classmethod
    def of(cls, name: str, parameter: Tensor, group: int) -> Moments:
        """Zeros, on the parameter's device."""
        local = local_tensor(parameter.detach())
        state = {key: torch.zeros_like(local) for key in ("exp_avg", "exp_avg_sq")}
        return cls(name, parameter, group, {**state, "step": torch.zeros((), device=local.device)})


class DenseAdamW:
    """`torch.optim.AdamW`'s step, fused, on the mean of the peers' gradients.

    Gradients are averaged in float32 (float64 for float64 parameters) by all-reduces of
    `BUCKET_ELEMENTS`; whatever a replica leaves out does not count. Replicas stay identical as far
    as an all-reduce gives all ranks the same bits, which is what DDP relies on too. A parameter
    that has no gradient on any replica is left alone, as torch does it; where others have one, a
    missing one is zero.

    Args:
        members: in the same order on all peers.
        peers: the ranks with the same shards in other replicas; None for nobody.

    Attributes:
        bytes_sent: of dense gradients, by this rank in a step.
    """

    def __init__(self, members: Sequence[Moments], peers: dist.ProcessGroup | None) -> None:
        self.members, self._peers = list(members), peers
        self._buckets = _buckets(self.members)
        self.bytes_sent = 0

    def step(self, groups: Sequence[dict[str, Any]], factor: Tensor) -> None:
        """Average the gradients and take a step; a collective over the peers.

        Args:
            groups: the optimiser's.
            factor: on the gradients, 0-d; not finite where this rank's are to be left out.
        """
        self.bytes_sent = 0
        for bucket in self._buckets:
            self._step(bucket, groups[bucket[0].group], factor)

    def _step(self, bucket: list[Moments], group: dict[str, Any], factor: Tensor) -> None:
        locals_ = [local_tensor(m.parameter.detach()) for m in bucket]
        device = locals_[0].device
        dtype = torch.promote_types(locals_[0].dtype, torch.float32)
        gradients = [local_gradient(m.parameter) for m in bucket]
        sizes = [t.numel() for t in locals_]
        total = sum(sizes)
        factor = factor.to(device, dtype, non_blocking=True)
        finite = factor.isfinite()
        # behind the gradients: whether there is each, and whether this rank's count
        flat = torch.zeros(total + len(bucket) + 1, dtype=dtype, device=device)
        for view, gradient in zip(flat[:total].split(sizes), gradients, strict=True):
            if gradient is not None:
                view.copy_(gradient.reshape(-1))
        flat[:total] = (flat[:total] * factor).where(finite, 0.0)
        flat[total:-1] = torch.tensor([float(g is not None) for g in gradients], dtype=dtype)
        flat[-1] = finite
        if self._peers is not None:
            flat = _summed(flat, self._peers)
            self.bytes_sent += flat.nbytes
        count = flat[-1]
        flat[:total] /= count.clamp(min=1)
        named = [True] * len(bucket)
        if any(g is None for g in gradients):  # only then is the device waited for
            named = [number > 0 for number in flat[total:-1].tolist()]
        chosen = [i for i, has in enumerate(named) if has]
        if not chosen:
            return
        means = [
            view.view(t.shape).to(t.dtype)
            for view, t in zip(flat[:total].split(sizes), locals_, strict=True)
        ]
        beta1, beta2 = group["betas"]
        adamw(
            [locals_[i] for i in chosen],
            [means[i] for i in chosen],
            [bucket[i].state["exp_avg"] for i in chosen],
            [bucket[i].state["exp_avg_sq"] for i in chosen],
            [],
            [bucket[i].state["step"] for i in chosen],
            fused=True,
            found_inf=(count == 0).to(torch.float32),
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def _summed(flat: Tensor, peers: dist.ProcessGroup) -> Tensor:
    staged = message_for(peers, flat)
    dist.all_reduce(staged, group=peers)
    return staged.to(flat.device)


def _buckets(members: Sequence[Moments]) -> list[list[Moments]]:
    """Members of one group, dtype and device together, up to `BUCKET_ELEMENTS`."""
    buckets: list[list[Moments]] = []
    filling: dict[object, tuple[list[Moments], int]] = {}
    for member in members:
        moment = member.state["exp_avg"]
        key = member.group, moment.dtype, moment.device
        bucket, held = filling.get(key, ([], 0))
        if not bucket or held + moment.numel() > BUCKET_ELEMENTS:
            bucket, held = [], 0
            buckets.append(bucket)
        bucket.append(member)
        filling[key] = bucket, held + moment.numel()
    return buckets
