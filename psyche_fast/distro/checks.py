"""What `Distro` and `DeMo` check of their arguments and saved state."""

from __future__ import annotations

from torch import Tensor

from psyche_fast.distro.chunks import ParameterLayout


def check_compression(decay: float, topk: int, chunk: int, weight_decay: float) -> None:
    """Check the numbers that `Distro` and `DeMo` share.

    Raises:
        ValueError: naming the argument.
    """
    if not 0 <= decay < 1:
        raise ValueError(f"compression_decay must be at least 0 and below 1, got {decay}")
    if topk <= 0:
        raise ValueError(f"compression_topk must be positive, got {topk}")
    if chunk <= 0:
        raise ValueError(f"compression_chunk must be positive, got {chunk}")
    if weight_decay < 0:
        raise ValueError(f"weight_decay must not be negative, got {weight_decay}")


def check_delta_shape(parameter: ParameterLayout, delta: Tensor) -> None:
    """Check that a saved delta has the encoded shape of its parameter.

    Raises:
        ValueError: it has not; the parameter is named.
    """
    if tuple(delta.shape) != parameter.xshape:
        raise ValueError(
            f"delta of parameter {parameter.name} is cut as {list(delta.shape)} "
            "in the saved state, but as "
            f"{list(parameter.xshape)} here (its shape or compression_chunk differs)"
        )
