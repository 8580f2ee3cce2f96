"""Blockwise quantisation: values of a chunk as a few bits each, with a scale or two of the chunk.

- 8 and 4 bits: whole multiples, halves to even, of the chunk's largest magnitude divided by 127 or
  7, float32.
- 2 bits: a sign, and one of two levels of the chunk's magnitudes, bfloat16: eight of Lloyd's
  iterations from the mean. A value has the upper level where its magnitude is above the mean of
  both.

All backends come to the same bits: sums are of integers, magnitudes that have been scaled by a
power of two to 24 bits, and exact; quotients are products with a reciprocal of three of Newton's
steps, in float32 with each operation rounded as IEEE asks. The division of GPUs is not. Of float64
values all is in float64.

A code has the sign in its lowest bit, above it the multiple or the number of the level.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from psyche_fast.kernels.backends import implementation
from psyche_fast.kernels.plan import ChunkPlan, Rates

Bits = Literal[2, 4, 8]

MOST_ENTRIES = (1 << 19) - 1
"""Values of a chunk whose two levels are found exactly in 64 bits."""


@dataclass(frozen=True)
class Codes:
    """Quantised values of a chunk class, of one replica or of several.

    Attributes:
        codes: uint8 `[.., n, k]`.
        scales: `[.., n, s]`: two bfloat16 levels, the lower one first, or one float32.
    """

    codes: Tensor
    scales: Tensor


def scales_like(bits: Bits) -> tuple[torch.dtype, int]:
    """Dtype of a chunk's scales, and how many there are."""
    return (torch.bfloat16, 2) if bits == 2 else (torch.float32, 1)


def quantise(
    plan: ChunkPlan, values: Tensor, bits: Bits, *, backend: str = "torch"
) -> tuple[Codes, Tensor]:
    """Quantise selected values, and see them as receivers do.

    Args:
        plan: their class.
        values: `[n, k]` in the compute dtype.
        bits: of a code.
        backend: resolved backend name.

    Returns:
        The codes, and the values that `dequantise` makes of them.
    """
    found: tuple[Codes, Tensor] = implementation(backend, "quantise").quantise(plan, values, bits)
    return found


def dequantise(plan: ChunkPlan, codes: Codes, bits: Bits, *, backend: str = "torch") -> Tensor:
    """Values `[peers, n, k]` in the compute dtype.

    Args:
        plan: their class.
        codes: of several peers.
        bits: of a code.
        backend: resolved backend name.
    """
    values: Tensor = implementation(backend, "quantise").dequantise(plan, codes, bits)
    return values


def encode_all(
    plan: ChunkPlan,
    delta: Tensor | None,
    gradients: Sequence[Tensor | None],
    learning_rates: Rates,
    *,
    bits: Bits | None,
    out: Tensor | None = None,
    decay: float = 0.0,
    gradient_scale: float | Tensor | None = None,
    anchors: Sequence[Tensor] | None = None,
    share: float = 0.0,
    exact: bool = False,
    backend: str = "torch",
) -> Codes | None:
    """All values of chunks without transform: take up, quantise and take out what is sent.

    `x = decay * delta + lr * gradient_scale * gradient`, with anchors as in `encode`; then
    `delta = x - share * y`, `y` being `x` as its receivers see it.

    Args:
        plan: the chunk class, without transform.
        delta: state `[chunks, h, w]` in the compute dtype, updated in place; None for zeros that
            are not kept.
        gradients: as of `encode`.
        learning_rates: as of `encode`.
        bits: of a code; None for values as they are.
        out: without bits, where values go: `[chunks, h * w]` of any floating-point dtype.
        decay: factor on `delta`.
        gradient_scale: as of `encode`.
        anchors: as of `encode`.
        share: of what is sent that is taken out.
        exact: take out `x` itself.
        backend: resolved backend name.

    Returns:
        The codes; None without bits.

    Raises:
        ValueError: as `encode`.
    """
    assert not plan.is_transformed
    assert (bits is None) == (out is not None)
    codes: Codes | None = implementation(backend, "quantise").encode_all(
        plan, delta, gradients, learning_rates, bits, out, decay, gradient_scale, anchors, share,
        exact,
    )  # fmt: skip
    return codes
