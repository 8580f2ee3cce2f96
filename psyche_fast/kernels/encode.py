"""Encode: momentum update, DCT and the largest coefficients of every chunk of a class."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from psyche_fast.kernels.backends import implementation
from psyche_fast.kernels.plan import ChunkPlan, Entries, Rates


def encode(
    plan: ChunkPlan,
    delta: Tensor,
    gradients: Sequence[Tensor | None],
    learning_rates: Rates,
    *,
    decay: float,
    gradient_scale: float | Tensor | None = None,
    previous: Entries | None = None,
    share: float = 1.0,
    anchors: Sequence[Tensor] | None = None,
    backend: str = "torch",
) -> Entries:
    """Update delta, transform it and select the k largest coefficients of every chunk.

    `delta = decay * (delta - share * decode(previous)) + lr * gradient_scale * gradient`, or with
    `anchor - gradient` in place of the gradient. A class without transform has its elements for
    coefficients.

    Args:
        plan: the chunk class.
        delta: state `[chunks, h, w]`, float32, bfloat16 or the compute dtype; updated in place.
        gradients: one tensor of the parameter's shape per member, None for zero.
        learning_rates: one per member.
        decay: factor on `delta`.
        gradient_scale: clip factor, a number or a 0-d float32 tensor on the device. Where it is not
            finite the gradients are left out, as if all were None: a bad gradient never enters the
            state.
        previous: own entries of the previous step, with unquantised values.
        share: of the previous entries that is taken out.
        anchors: float32 tensors like the gradients, from which these are subtracted in float32.
        backend: resolved backend name.

    Returns:
        `plan.k` entries per chunk in ascending order of index, values in `plan.dtype`. Of
        coefficients with equal magnitude the one with the lower index is kept.

    Raises:
        ValueError: a gradient of another shape or device than its parameter (Triton backends).
        RuntimeError: the class is in use on another CUDA stream.
    """
    entries: Entries = implementation(backend, "encode").encode(
        plan, delta, gradients, learning_rates, decay, gradient_scale, previous, share, anchors
    )
    return entries


def update(
    plan: ChunkPlan,
    delta: Tensor,
    gradients: Sequence[Tensor | None],
    learning_rates: Rates,
    *,
    decay: float,
    gradient_scale: float | Tensor | None = None,
    previous: Entries | None = None,
    share: float = 1.0,
    anchors: Sequence[Tensor] | None = None,
    backend: str = "torch",
) -> None:
    """Update delta as `encode` does, of a class without transform, and select nothing.

    Raises:
        ValueError: as `encode`.
    """
    assert not plan.is_transformed
    implementation(backend, "encode").update(
        plan, delta, gradients, learning_rates, decay, gradient_scale, previous, share, anchors
    )
