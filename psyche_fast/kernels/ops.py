"""The operations as PyTorch custom operators, for callers that `torch.compile` traces.

`torch.ops.psyche_fast.encode` and so on take plain tensors and numbers, with the chunk class by its
`handle`; the functions of `psyche_fast.kernels` go through them while they are being traced, and
call the implementation directly otherwise (an operator's boundary costs tens of microseconds).
Learning rates come as a list of numbers, or as a tensor beside an empty list; an empty list of
parameters stands for none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from psyche_fast.kernels.backends import implementation
from psyche_fast.kernels.plan import Entries, Rates, plan_of


def parts(rates: Rates | None) -> tuple[list[float], Tensor | None]:
    """Rates as operators take them."""
    if rates is None or isinstance(rates, Tensor):
        return [], rates
    return list(rates), None


def _rates(numbers: Sequence[float], tensor: Tensor | None) -> Rates | None:
    return tensor if tensor is not None else (numbers or None)


def _wanted(numbers: Sequence[float], tensor: Tensor | None) -> Rates:
    rates = _rates(numbers, tensor)
    if rates is None:
        raise ValueError("learning_rates: neither numbers nor a tensor were given")
    return rates


@torch.library.custom_op("psyche_fast::encode", mutates_args={"delta", "parameters"})
def encode(
    handle: str,
    delta: Tensor,
    gradients: Sequence[Tensor | None],
    learning_rates: Sequence[float],
    learning_rate: Tensor | None,
    decay: float,
    gradient_scale: float,
    gradient_factor: Tensor | None,
    previous_indices: Tensor | None,
    previous_values: Tensor | None,
    previous_unique: bool,
    parameters: Sequence[Tensor],
    previous_rates: Sequence[float],
    previous_rate: Tensor | None,
    shrinks: Sequence[float],
    shrink: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """See `psyche_fast.kernels.encode`; returns indices and values."""
    previous = None
    if previous_indices is not None and previous_values is not None:
        previous = Entries(previous_indices, previous_values, previous_unique)
    entries = implementation(backend).encode(
        plan_of(handle),
        delta,
        gradients,
        _wanted(learning_rates, learning_rate),
        decay=decay,
        gradient_scale=gradient_scale if gradient_factor is None else gradient_factor,
        previous=previous,
        parameters=parameters or None,
        previous_rates=_rates(previous_rates, previous_rate),
        shrinks=_rates(shrinks, shrink),
    )
    return entries.indices, entries.values


@encode.register_fake
def _(handle, delta, *arguments):  # type: ignore[no-untyped-def]
    plan = plan_of(handle)
    shape = (plan.chunks, plan.k)
    return (
        delta.new_empty(shape, dtype=plan.index_dtype),
        delta.new_empty(shape, dtype=plan.dtype),
    )


@torch.library.custom_op("psyche_fast::subtract", mutates_args={"delta"})
def subtract(
    handle: str, delta: Tensor, indices: Tensor, values: Tensor, unique: bool, backend: str
) -> None:
    """See `psyche_fast.kernels.subtract`."""
    implementation(backend).subtract(plan_of(handle), delta, Entries(indices, values, unique))


@torch.library.custom_op("psyche_fast::apply", mutates_args={"parameters", "ahead"})
def apply(
    handle: str,
    parameters: Sequence[Tensor],
    indices: Tensor,
    values: Tensor,
    unique: bool,
    learning_rates: Sequence[float],
    learning_rate: Tensor | None,
    shrinks: Sequence[float],
    shrink: Tensor | None,
    ahead: Sequence[Tensor],
    in_place: bool,
    delta: Tensor | None,
    backend: str,
) -> None:
    """See `psyche_fast.kernels.apply`; `in_place`: the look-ahead goes into the parameters."""
    implementation(backend).apply(
        plan_of(handle),
        parameters,
        Entries(indices, values, unique),
        _wanted(learning_rates, learning_rate),
        shrinks=_rates(shrinks, shrink),
        ahead=parameters if in_place else (ahead or None),
        delta=delta,
    )


@torch.library.custom_op("psyche_fast::lookahead", mutates_args={"parameters", "ahead"})
def lookahead(
    handle: str,
    parameters: Sequence[Tensor],
    delta: Tensor,
    learning_rates: Sequence[float],
    learning_rate: Tensor | None,
    ahead: Sequence[Tensor],
    backend: str,
) -> None:
    """See `psyche_fast.kernels.lookahead`."""
    implementation(backend).lookahead(
        plan_of(handle),
        parameters,
        delta,
        _wanted(learning_rates, learning_rate),
        ahead=ahead or None,
    )


@subtract.register_fake
@apply.register_fake
@lookahead.register_fake
def _nothing(*arguments):  # type: ignore[no-untyped-def]
    return None
