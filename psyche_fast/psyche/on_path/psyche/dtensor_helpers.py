"""What the core calls on distributed parameters."""

from psyche_fast.psyche.dtensor_helpers import (
    calculate_local_tensor_from_full,
    full_tensor_shape,
    gather_full_tensor,
    set_grad,
    zero_grad,
    zeros_like,
)
from psyche_fast.psyche.dtensor_helpers import local_tensor_of as local_tensor

__all__ = [
    "calculate_local_tensor_from_full",
    "full_tensor_shape",
    "gather_full_tensor",
    "local_tensor",
    "set_grad",
    "zero_grad",
    "zeros_like",
]
