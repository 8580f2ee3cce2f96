"""Gradients of one step: fp32 accumulation, their global norm and its clipping.

Works on a mixture of plain tensors and DTensors of several meshes, where torch's own
``clip_grad_norm_`` raises: parameters are taken by the mesh dimensions that shard them, one
squared sum each, added up over those dimensions only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from psyche_fast.distro.placement import local_tensor


class Fp32Accumulator:
    """Adds up micro-batches' gradients in fp32, whatever the parameters' type.

    After each backward ``add`` moves the gradients over and clears them; ``finish`` leaves the
    sums as the parameters' ``.grad``.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        """Takes the parameters by name; sums are allocated with the first gradient."""
        self._parameters = list(parameters.values())
        self._sums: list[Tensor | None] = [None] * len(self._parameters)

    @torch.no_grad()
    def add(self) -> None:
        """Adds every ``.grad`` to its sum and clears it."""
        into, gradients = [], []
        for at, parameter in enumerate(self._parameters):
            if parameter.grad is None:
                continue
            total = self._sums[at]
            if total is None:
                self._sums[at] = parameter.grad.float()
            else:
                into.append(local_tensor(total))
                gradients.append(local_tensor(parameter.grad))
            parameter.grad = None
        if into:
            torch._foreach_add_(into, gradients)

    def finish(self) -> None:
        """Makes the sums the parameters' gradients (``grad_dtype`` lets them be fp32)."""
        for at, parameter in enumerate(self._parameters):
            total, self._sums[at] = self._sums[at], None
            if total is not None:
                parameter.grad_dtype = None  # type: ignore[attr-defined]
                parameter.grad = total


def drop_gradients(parameters: Mapping[str, Tensor]) -> None:
    """Clears all gradients."""
    for parameter in parameters.values():
        parameter.grad = None


def local_parts(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This rank's part of each parameter, by name."""
    return {name: local_tensor(p.detach()) for name, p in parameters.items()}


def gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    """The gradients that there are."""
    return [p.grad for p in parameters if p.grad is not None]


@torch.no_grad()
def global_norm(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    """L2 norm of all tensors together, over all ranks that hold parts of them.

    Args:
        tensors: plain tensors (the same on every rank) and DTensors.
        device: where the result lies.

    Returns:
        fp32, 0-d, the same bits on every rank of the replica. No synchronisation with the host.
    """
    groups: dict[tuple[dist.ProcessGroup, ...], list[Tensor]] = {}
    for tensor in tensors:
        key: tuple[dist.ProcessGroup, ...] = ()
        if isinstance(tensor, DTensor):
            mesh = tensor.device_mesh
            # Not ``is_shard``: the strided shards of FSDP2 over tensor parallelism answer no.
            assert not any(placement.is_partial() for placement in tensor.placements)
            key = tuple(
                mesh.get_group(dim)
                for dim, placement in enumerate(tensor.placements)
                if not placement.is_replicate()
            )
        if local_tensor(tensor).numel():
            groups.setdefault(key, []).append(local_tensor(tensor))
        else:
            groups.setdefault(key, [])
    total = torch.zeros((), device=device)
    for key, members in groups.items():
        squares = torch.zeros((), device=device)
        if members:
            norms = torch._foreach_norm(members, 2.0, dtype=torch.float32)
            squares = torch.stack(norms).square().sum()
        for group in key:
            dist.all_reduce(squares, group=group)
        total += squares
    return total.sqrt()


def clip_factor(norm: Tensor, max_norm: float | None) -> Tensor | float:
    """What to multiply gradients by so that their norm is at most ``max_norm``; 1 for None."""
    if max_norm is None:
        return 1.0
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


@torch.no_grad()
def scale_(tensors: Iterable[Tensor], factor: Tensor | float) -> None:
    """Multiplies in place."""
    parts = [local_tensor(tensor) for tensor in tensors]
    if parts and not (isinstance(factor, float) and factor == 1.0):
        torch._foreach_mul_(parts, factor)
