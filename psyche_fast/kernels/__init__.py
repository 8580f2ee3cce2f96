"""The DisTrO step as a few coarse operations, each over one whole chunk class (`ChunkPlan`).

Every operation dispatches by backend to a module of the same name; `"torch"` is the plain PyTorch
implementation in `kernels/reference/`. A backend that cannot run is refused with an error; nothing
falls back silently.

Operations work in place on the tensors that they are given and never wait for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

from torch import Tensor

from psyche_fast.kernels import reference
from psyche_fast.kernels.plan import ChunkPlan, Entries

_BACKENDS: dict[str, ModuleType] = {"torch": reference}

__all__ = ["apply", "encode", "lookahead", "resolve_backend", "subtract"]


def resolve_backend(backend: str) -> str:
    """Name of the backend that `backend` stands for: `"auto"` picks, any other name must exist.

    Raises:
        ValueError: `backend` is not known.
    """
    if backend == "auto":
        return "torch"
    if backend not in _BACKENDS:
        known = ", ".join(["auto", *_BACKENDS])
        raise ValueError(f"backend must be one of {known}; got {backend!r}")
    return backend


def encode(
    plan: ChunkPlan,
    delta: Tensor,
    gradients: Sequence[Tensor | None],
    learning_rates: Sequence[float],
    *,
    decay: float,
    gradient_scale: float | Tensor = 1.0,
    previous: Entries | None = None,
    backend: str = "torch",
) -> Entries:
    """Update delta, transform it and take the k largest coefficients of every chunk.

    `delta = decay * (delta - decode(previous)) + lr * gradient_scale * gradient`.

    Args:
        plan: the chunk class.
        delta: state `[chunks, h, w]`, updated in place.
        gradients: one tensor of the parameter's shape per member, None for zero.
        learning_rates: one per member.
        decay: factor on `delta`.
        gradient_scale: clip factor, a number or a 0-d tensor on the device.
        previous: own entries of the previous step, with unquantised values.
        backend: resolved backend name.

    Returns:
        `plan.k` entries per chunk in ascending order of index, values in `plan.dtype`. Of
        coefficients with equal magnitude the one with the lower index is kept.
    """
    return _BACKENDS[backend].encode(  # type: ignore[no-any-return]
        plan, delta, gradients, learning_rates, decay, gradient_scale, previous
    )


def subtract(
    plan: ChunkPlan,
    delta: Tensor,
    entries: Entries,
    *,
    parameters: Sequence[Tensor] | None = None,
    learning_rates: Sequence[float] | None = None,
    backend: str = "torch",
) -> None:
    """`delta -= decode(entries)`; with `parameters` also their sign update, from one decode.

    Args:
        plan: the chunk class.
        delta: state `[chunks, h, w]`, updated in place.
        entries: what has been sent.
        parameters: one tensor per member, updated in place (a group of one peer: the mean is the
            own result).
        learning_rates: one per member; with `parameters`.
        backend: resolved backend name.
    """
    _BACKENDS[backend].subtract(plan, delta, entries, parameters, learning_rates)


def apply(
    plan: ChunkPlan,
    parameters: Sequence[Tensor],
    entries: Entries,
    learning_rates: Sequence[float],
    *,
    backend: str = "torch",
) -> None:
    """`parameter -= lr * sign(decode(entries))`.

    Each coefficient is the mean over the entries that name it.

    Args:
        plan: the chunk class.
        parameters: one tensor per member, updated in place.
        entries: all peers' entries side by side, in peer order.
        learning_rates: one per member.
        backend: resolved backend name.
    """
    _BACKENDS[backend].apply(plan, parameters, entries, learning_rates)


def lookahead(
    plan: ChunkPlan,
    parameters: Sequence[Tensor],
    delta: Tensor,
    learning_rates: Sequence[float],
    *,
    backend: str = "torch",
) -> None:
    """`parameter -= lr * sign(delta)`, with `delta` chunk-major, `[chunks, h, w]`."""
    _BACKENDS[backend].lookahead(plan, parameters, delta, learning_rates)
