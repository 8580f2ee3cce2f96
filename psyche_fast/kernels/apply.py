"""Apply: peers' results into the parameters, with the next look-ahead; and its parts alone.

The direction of an update is decided in integers, as `psyche_fast/integers.py` defines it.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from psyche_fast.integers import MOST_ENTRIES
from psyche_fast.kernels.backends import implementation
from psyche_fast.kernels.plan import ChunkPlan, Entries, Rates


def subtract(plan: ChunkPlan, delta: Tensor, entries: Entries, *, backend: str = "torch") -> None:
    """`delta -= decode(entries)`.

    Args:
        plan: the chunk class.
        delta: state `[chunks, h, w]`, updated in place.
        entries: what has been sent. Each coefficient is the mean over the entries that name it.
        backend: resolved backend name.

    Raises:
        RuntimeError: the class is in use on another CUDA stream.
    """
    implementation(backend, "apply").subtract(plan, delta, entries)


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
        parameters: one tensor per member, of the class's dtype or float32, updated in place.
        entries: all peers' entries side by side, at most 65535 of a chunk. The result is the same
            on any hardware, in whatever order they are.
        learning_rates: one per member.
        shrinks: factors on the parameters (weight decay); None for 1.
        ahead: one tensor per member, of the class's dtype, written to; none of `parameters`'
            memory.
        delta: state `[chunks, h, w]`, read; given with `ahead` only.
        backend: resolved backend name.

    Raises:
        ValueError: more entries; a tensor of another shape, dtype or device than the class (Triton
            backends).
        RuntimeError: the class is in use on another CUDA stream.
    """
    if entries.indices.shape[1] > MOST_ENTRIES:
        raise ValueError(
            f"{entries.indices.shape[1]} entries of a chunk: apply takes up to {MOST_ENTRIES}; "
            "lower compression_topk, or use fewer replicas"
        )
    assert (ahead is None) == (delta is None)
    implementation(backend, "apply").apply(
        plan, parameters, entries, learning_rates, shrinks, ahead, delta
    )


def lookahead(
    plan: ChunkPlan,
    parameters: Sequence[Tensor],
    delta: Tensor,
    learning_rates: Rates,
    ahead: Sequence[Tensor],
    *,
    backend: str = "torch",
) -> None:
    """`ahead = parameter - lr * sign(delta)`.

    Args:
        plan: the chunk class.
        parameters: one tensor per member, of the class's dtype or float32, read.
        delta: state `[chunks, h, w]`, read.
        learning_rates: one per member.
        ahead: one tensor per member, of the class's dtype, written to.
        backend: resolved backend name.

    Raises:
        ValueError: a tensor of another shape, dtype or device than the class (Triton backends).
        RuntimeError: the class is in use on another CUDA stream.
    """
    implementation(backend, "apply").lookahead(plan, parameters, delta, learning_rates, ahead)
