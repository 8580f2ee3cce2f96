"""Encode: momentum update, DCT and the largest coefficients of every chunk of a class."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from psyche_fast.kernels import ops
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
    parameters: Sequence[Tensor] | None = None,
    previous_rates: Rates | None = None,
    shrinks: Rates | None = None,
    backend: str = "torch",
) -> Entries:
    """Update delta, transform it and take the k largest coefficients of every chunk.

    `delta = decay * (delta - decode(previous)) + lr * gradient_scale * gradient`.

    With `parameters` the look-ahead is first undone where it lies, and the weights decayed:
    `parameter = (parameter + previous_rate * sign(delta)) * shrink`, with `delta` from before.

    Args:
        plan: the chunk class.
        delta: state `[chunks, h, w]`, updated in place.
        gradients: one tensor of the parameter's shape per member, None for zero.
        learning_rates: one per member.
        decay: factor on `delta`.
        gradient_scale: clip factor, a number or a 0-d float32 tensor on the device. Where it is not
            finite the gradients are left out, as if all were None: a bad gradient never enters the
            state.
        previous: own entries of the previous step, with unquantised values.
        parameters: one tensor per member that holds the look-ahead, updated in place.
        previous_rates: the look-ahead's learning rates, with `parameters`.
        shrinks: factors on the parameters, with `parameters`; None for 1.
        backend: resolved backend name.

    Returns:
        `plan.k` entries per chunk in ascending order of index, values in `plan.dtype`. Of
        coefficients with equal magnitude the one with the lower index is kept.
    """
    if torch.compiler.is_compiling():
        tensor = gradient_scale if isinstance(gradient_scale, Tensor) else None
        number = gradient_scale if isinstance(gradient_scale, int | float) else 1.0
        indices, values = ops.encode(
            plan.handle,
            delta,
            gradients,
            *ops.parts(learning_rates),
            decay,
            number,
            tensor,
            None if previous is None else previous.indices,
            None if previous is None else previous.values,
            previous is not None and previous.unique,
            list(parameters or ()),
            *ops.parts(previous_rates),
            *ops.parts(shrinks),
            backend,
        )
        return Entries(indices, values, unique=True)
    return implementation(backend).encode(  # type: ignore[no-any-return]
        plan,
        delta,
        gradients,
        learning_rates,
        decay=decay,
        gradient_scale=gradient_scale,
        previous=previous,
        parameters=parameters,
        previous_rates=previous_rates,
        shrinks=shrinks,
    )
