"""fp32 sums of micro-batches' gradients and squared norms, over all tensors in one launch.

Pointers change from call to call, sizes do not: an `AccumulationPlan` holds what stays. Nothing
waits for the device, and results are the same bits whenever inputs are.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from psyche_fast.devices import indexed
from psyche_fast.kernels.backends import implementation

GRADIENT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

__all__ = ["AccumulationPlan", "accumulate", "plan_accumulation", "squared_norms"]


@dataclass(frozen=True, eq=False, slots=True, weakref_slot=True)
class AccumulationPlan:
    """A list of tensors by size, and whose squares are added up together.

    Attributes:
        numels: elements of each tensor; any may be 0.
        groups: number of each tensor's group, `0 .. group_count - 1`.
        group_count: number of groups.
        device: where all tensors lie; always with its index.
    """

    numels: tuple[int, ...]
    groups: tuple[int, ...]
    group_count: int
    device: torch.device


def plan_accumulation(
    numels: tuple[int, ...], groups: tuple[int, ...], device: torch.device
) -> AccumulationPlan:
    """The plan for tensors of these sizes; the same object for the same arguments.

    Args:
        numels: elements of each tensor.
        groups: number of each tensor's group; groups are counted from 0 without gaps.
        device: where the tensors lie.
    """
    return _plan(numels, groups, indexed(device))


@functools.lru_cache(maxsize=256)
def _plan(
    numels: tuple[int, ...], groups: tuple[int, ...], device: torch.device
) -> AccumulationPlan:
    assert len(numels) == len(groups)
    count = len(set(groups))
    assert all(0 <= group < count for group in groups)
    return AccumulationPlan(numels, groups, count, device)


def accumulate(
    plan: AccumulationPlan,
    sums: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    fresh: Sequence[bool],
    *,
    squares: bool = False,
    backend: str = "torch",
) -> Tensor | None:
    """Add gradients to fp32 sums, one launch for all of them.

    Args:
        plan: sizes and groups.
        sums: float32, contiguous, each of its gradient's shape; updated in place.
        gradients: bfloat16, float16 or float32, in any mixture; None leaves the sum alone.
        fresh: whether a sum holds nothing yet: it is then written without being read.
        squares: also return the squared norms of the new sums, from the same pass.
        backend: resolved backend name.

    Returns:
        With `squares` float32 `[plan.group_count]`, the squared L2 norm of each group's sums; sums
        that are fresh and got no gradient count nothing. Otherwise None.

    Raises:
        TypeError: a dtype of another kind.
        ValueError: a tensor of another size or on another device, or a sum with gaps or of another
            shape than its gradient.
    """
    assert len(sums) == len(gradients) == len(fresh) == len(plan.numels)
    for number, total in enumerate(sums):
        _check(plan, number, total, "sum")
        if total.dtype != torch.float32:
            raise TypeError(f"sum {number}: wanted torch.float32, got {total.dtype}")
        if not total.is_contiguous():
            raise ValueError(f"sum {number}: wanted a contiguous tensor, got {total.stride()}")
    dense = [_dense(plan, number, gradient) for number, gradient in enumerate(gradients)]
    for number, (total, gradient) in enumerate(zip(sums, dense, strict=True)):
        if gradient is not None and gradient.shape != total.shape:
            raise ValueError(
                f"sum {number}: wanted its gradient's shape {list(gradient.shape)}, "
                f"got {list(total.shape)}"
            )
    result: Tensor | None = implementation(backend, "accumulate").accumulate(
        plan, sums, dense, fresh, squares
    )
    return result


def squared_norms(
    plan: AccumulationPlan, tensors: Sequence[Tensor | None], *, backend: str = "torch"
) -> Tensor:
    """Squared L2 norm of each group of tensors, in one pass over them.

    Args:
        plan: sizes and groups.
        tensors: bfloat16, float16 or float32, in any mixture; None counts nothing.
        backend: resolved backend name.

    Returns:
        float32 `[plan.group_count]`; arithmetic is done in float32.

    Raises:
        TypeError: a dtype of another kind.
        ValueError: a tensor of another size or on another device.
    """
    assert len(tensors) == len(plan.numels)
    dense = [_dense(plan, number, tensor) for number, tensor in enumerate(tensors)]
    result: Tensor = implementation(backend, "accumulate").squared_norms(plan, dense)
    return result


def _check(plan: AccumulationPlan, number: int, tensor: Tensor, what: str) -> None:
    if tensor.numel() != plan.numels[number]:
        raise ValueError(
            f"{what} {number}: wanted {plan.numels[number]} elements, got {tensor.numel()}"
        )
    if tensor.device != plan.device:
        raise ValueError(f"{what} {number}: wanted a tensor on {plan.device}, got {tensor.device}")


def _dense(plan: AccumulationPlan, number: int, gradient: Tensor | None) -> Tensor | None:
    """The gradient in row-major order; autograd gives another only where a parameter has it."""
    if gradient is None:
        return None
    _check(plan, number, gradient, "gradient")
    if gradient.dtype not in GRADIENT_DTYPES:
        wanted = ", ".join(str(dtype) for dtype in GRADIENT_DTYPES)
        raise TypeError(f"gradient {number}: wanted one of {wanted}, got {gradient.dtype}")
    return gradient.contiguous()
