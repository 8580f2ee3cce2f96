"""The DisTrO step as a few coarse operations, each over one whole chunk class (`ChunkPlan`).

Every operation dispatches by backend to a function of the same name: `"torch"` is plain PyTorch
(`kernels/reference/`), `"triton"` the GPU kernels and `"interpret"` the same kernels run by
Triton's interpreter on the CPU (`kernels/triton/`). A backend that cannot run is refused with an
error; nothing falls back silently, and `explain` says what `"auto"` takes and why.

Operations work in place on the tensors that they are given and never wait for the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from psyche_fast.kernels import ops
from psyche_fast.kernels.backends import explain, implementation, resolve_backend
from psyche_fast.kernels.plan import ChunkPlan, Entries, Rates

__all__ = ["apply", "encode", "explain", "lookahead", "resolve_backend", "subtract"]


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


def subtract(plan: ChunkPlan, delta: Tensor, entries: Entries, *, backend: str = "torch") -> None:
    """`delta -= decode(entries)`.

    Args:
        plan: the chunk class.
        delta: state `[chunks, h, w]`, updated in place.
        entries: what has been sent. Each coefficient is the mean over the entries that name it.
        backend: resolved backend name.
    """
    if torch.compiler.is_compiling():
        ops.subtract(plan.handle, delta, entries.indices, entries.values, entries.unique, backend)
        return
    implementation(backend).subtract(plan, delta, entries)


def apply(
    plan: ChunkPlan,
    parameters: Sequence[Tensor],
    entries: Entries,
    learning_rates: Rates,
    *,
    shrinks: Rates | None = None,
    ahead: Sequence[Tensor] | None = None,
    delta: Tensor | None = None,
    backend: str = "torch",
) -> None:
    """`parameter = shrink * parameter - lr * sign(decode(entries))`.

    Each coefficient is the mean over the entries that name it. With `ahead` and `delta` also
    `ahead = parameter - lr * sign(delta)`, from the parameter as it has just been rounded: the
    look-ahead for the next forward.

    Args:
        plan: the chunk class.
        parameters: one tensor per member, updated in place.
        entries: all peers' entries side by side. The result does not depend on their order but for
            the rounding of means of floats by the `torch` backend.
        learning_rates: one per member.
        shrinks: factors on the parameters (weight decay); None for 1.
        ahead: one tensor per member, written to; with `delta`. The parameters themselves stand for
            a look-ahead without a master copy.
        delta: state `[chunks, h, w]`, read.
        backend: resolved backend name.
    """
    if torch.compiler.is_compiling():
        in_place = ahead is not None and all(a is p for a, p in zip(ahead, parameters, strict=True))
        ops.apply(
            plan.handle,
            parameters,
            entries.indices,
            entries.values,
            entries.unique,
            *ops.parts(learning_rates),
            *ops.parts(shrinks),
            [] if ahead is None or in_place else ahead,
            in_place,
            delta,
            backend,
        )
        return
    implementation(backend).apply(
        plan, parameters, entries, learning_rates, shrinks=shrinks, ahead=ahead, delta=delta
    )


def lookahead(
    plan: ChunkPlan,
    parameters: Sequence[Tensor],
    delta: Tensor,
    learning_rates: Rates,
    *,
    ahead: Sequence[Tensor] | None = None,
    backend: str = "torch",
) -> None:
    """`ahead = parameter - lr * sign(delta)`, with `delta` chunk-major, `[chunks, h, w]`.

    Args:
        plan: the chunk class.
        parameters: one tensor per member.
        delta: state, read.
        learning_rates: one per member.
        ahead: where the result goes, one tensor per member; None: into the parameters.
        backend: resolved backend name.
    """
    if torch.compiler.is_compiling():
        rates = ops.parts(learning_rates)
        ops.lookahead(plan.handle, parameters, delta, *rates, list(ahead or ()), backend)
        return
    implementation(backend).lookahead(plan, parameters, delta, learning_rates, ahead=ahead)
