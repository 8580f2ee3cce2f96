"""What Psyche's trainer does to distributed parameters, each call a collective or none."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from psyche_fast.sharding import local_tensor, placed_like


def full_tensor_shape(dtensor: DTensor) -> list[int]:
    """The shape of the whole."""
    return list(dtensor.shape)


def gather_full_tensor(dtensor: DTensor) -> Tensor:
    """The whole, on every rank; a collective."""
    return dtensor.full_tensor()


def calculate_local_tensor_from_full(tensor: Tensor, like: DTensor) -> DTensor:
    """A whole tensor of the first rank, placed as `like` is; a collective."""
    return distribute_tensor(tensor, like.device_mesh, like.placements)


def zeros_like(dtensor: DTensor) -> DTensor:
    """Zeros of the same type and placement."""
    with torch.no_grad():
        return placed_like(torch.zeros_like(local_tensor(dtensor)), dtensor)


def local_tensor_of(dtensor: DTensor) -> Tensor:
    """This rank's part, sharing its memory."""
    return dtensor.to_local()


def set_grad(tensor: Tensor, grad: Tensor) -> None:
    """Writes a whole gradient of the first rank into the gradient there is.

    A collective for a distributed tensor.

    Raises:
        ValueError: the parameter has no gradient yet.
    """
    if tensor.grad is None:
        raise ValueError("results came before the first `train`: a parameter has no gradient yet")
    with torch.no_grad():
        if isinstance(tensor, DTensor):
            assert isinstance(tensor.grad, DTensor)
            grad = calculate_local_tensor_from_full(grad, tensor.grad)
        local_tensor(tensor.grad).copy_(local_tensor(grad))


def zero_grad(tensor: Tensor) -> None:
    """Zeroes the gradient where there is one."""
    if tensor.grad is not None:
        with torch.no_grad():
            local_tensor(tensor.grad).zero_()
