"""Gradients of one step: fp32 accumulation, their global norm and its clipping.

Works on a mixture of plain tensors and DTensors of several meshes, where torch's own
`clip_grad_norm_` raises: parameters are taken by the mesh dimensions that shard them, one
squared sum each, added up over those dimensions only. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from psyche_fast.kernels.accumulate import accumulate, plan_accumulation, squared_norms
from psyche_fast.kernels.backends import resolve_backend
from psyche_fast.sharding import local_tensor, placed_like

_Key = tuple[dist.ProcessGroup, ...]
"""The groups over which a tensor's shards are spread; empty where every rank has all of it."""

_ALIGNMENT = 64
"""Elements: sums start at multiples of 256 bytes, as tensors of their own would."""


class Fp32Accumulator:
    """Adds up micro-batches' gradients in fp32, whatever the parameters' type.

    After each backward `add` moves the gradients over and clears them; `finish` leaves the
    sums as the parameters' `.grad`, where they stay valid until the next `add`. The sums lie in
    one buffer, allocated with the first gradient and kept.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        """Takes the parameters by name."""
        self._parameters = list(parameters.values())
        local = [local_tensor(p.detach()) for p in self._parameters]
        self._device = local[0].device
        self._backend = resolve_backend("auto", self._device)
        numbers, self._keys = _number_keys(self._parameters)
        numels = tuple(t.numel() for t in local)
        self._plan = plan_accumulation(numels, tuple(numbers), self._device)
        self._sums: list[Tensor] = []
        self._gradients: list[Tensor] = []
        self._fresh = [True] * len(local)
        self._squares: Tensor | None = None

    @torch.no_grad()
    def add(self, *, last: bool = False) -> None:
        """Adds every `.grad` to its sum and clears it.

        Args:
            last: no more will come: the norm that `finish` returns is taken in the same pass.
        """
        given = [None if p.grad is None else _local_gradient(p, p.grad) for p in self._parameters]
        if not self._sums:
            self._allocate()
        self._squares = accumulate(
            self._plan, self._sums, given, self._fresh, squares=last, backend=self._backend
        )
        self._fresh = [f and g is None for f, g in zip(self._fresh, given, strict=True)]
        drop_gradients(self._parameters)

    @torch.no_grad()
    def finish(self) -> Tensor:
        """Makes the sums the parameters' gradients (`grad_dtype` lets them be fp32).

        Returns:
            Their global norm, as `global_norm` has it.
        """
        for at, parameter in enumerate(self._parameters):
            if not self._fresh[at]:
                parameter.grad_dtype = None  # type: ignore[attr-defined]
                parameter.grad = self._gradients[at]
        squares, self._squares = self._squares, None
        assert squares is not None, "the last micro-batch was added as the last"
        self._fresh = [True] * len(self._fresh)
        return _norm(squares, self._keys, self._device)

    def _allocate(self) -> None:
        starts, size = [], 0
        for numel in self._plan.numels:
            starts.append(size)
            size += -(-numel // _ALIGNMENT) * _ALIGNMENT
        buffer = torch.empty(size, dtype=torch.float32, device=self._device)
        for parameter, start, numel in zip(
            self._parameters, starts, self._plan.numels, strict=True
        ):
            local = buffer[start : start + numel].view(local_tensor(parameter).shape)
            self._sums.append(local)
            if isinstance(parameter, DTensor):
                self._gradients.append(placed_like(local, parameter))
            else:
                self._gradients.append(local)


def drop_gradients(parameters: Iterable[Tensor]) -> None:
    """Clears all gradients."""
    for parameter in parameters:
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
        device: where they and the result lie.

    Returns:
        fp32, 0-d, the same bits on every rank of the replica. No synchronisation with the host.
    """
    tensors = list(tensors)
    numbers, keys = _number_keys(tensors)
    local = [local_tensor(tensor) for tensor in tensors]
    device = local[0].device if local else device  # with its index
    plan = plan_accumulation(tuple(t.numel() for t in local), tuple(numbers), device)
    squares = squared_norms(plan, local, backend=resolve_backend("auto", device))
    return _norm(squares, keys, device)


def _number_keys(tensors: Sequence[Tensor]) -> tuple[list[int], list[_Key]]:
    """Which of the keys each tensor has, and the keys in order of appearance."""
    known: dict[_Key, int] = {}
    numbers = []
    for tensor in tensors:
        key: _Key = ()
        if isinstance(tensor, DTensor):
            mesh = tensor.device_mesh
            # Not `is_shard`: the strided shards of FSDP2 over tensor parallelism answer no.
            assert not any(placement.is_partial() for placement in tensor.placements)
            key = tuple(
                mesh.get_group(dim)
                for dim, placement in enumerate(tensor.placements)
                if not placement.is_replicate()
            )
        numbers.append(known.setdefault(key, len(known)))
    return numbers, list(known)


def _norm(squares: Tensor, keys: Sequence[_Key], device: torch.device) -> Tensor:
    """The norm from each key's squares on this rank."""
    total = torch.zeros((), device=device)
    for number, key in enumerate(keys):
        for group in key:
            dist.all_reduce(squares[number], group=group)
        total += squares[number]
    return total.sqrt()


def _local_gradient(parameter: Tensor, gradient: Tensor) -> Tensor:
    if isinstance(gradient, DTensor):
        assert isinstance(parameter, DTensor) and gradient.placements == parameter.placements
    return local_tensor(gradient)


def clip_factor(norm: Tensor, max_norm: float | None) -> Tensor:
    """What to multiply gradients by so that their norm is at most `max_norm`.

    Args:
        norm: fp32, 0-d.
        max_norm: None for no limit.

    Returns:
        fp32, 0-d, at most 1; NaN where `norm` is not finite, by which an optimiser knows on the
        device that the gradient is to be refused.
    """
    if max_norm is None:
        factor = torch.ones_like(norm)
    else:
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    return factor.where(norm.isfinite(), torch.nan)


@torch.no_grad()
def scale_(tensors: Iterable[Tensor], factor: Tensor) -> None:
    """Multiplies in place by a 0-d tensor on the tensors' device, which is not waited for."""
    parts = [local_tensor(tensor) for tensor in tensors]
    if parts:
        torch._foreach_mul_(parts, factor)
