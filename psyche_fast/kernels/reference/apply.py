"""Sign updates of the parameters: the peers' mean, and the look-ahead."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from psyche_fast.kernels.plan import ChunkPlan, Entries
from psyche_fast.kernels.reference.decode import decode
from psyche_fast.kernels.reference.transform import ieee_matmul
from psyche_fast.kernels.reference.update import signed_step


def apply(
    plan: ChunkPlan, parameters: Sequence[Tensor], entries: Entries, learning_rates: Sequence[float]
) -> None:
    """See `psyche_fast.kernels.apply`."""
    with ieee_matmul():
        for part in plan.slices:
            direction = decode(plan, entries, part.start, part.stop).sign_()
            signed_step(plan, part, parameters, direction, learning_rates)


def lookahead(
    plan: ChunkPlan, parameters: Sequence[Tensor], delta: Tensor, learning_rates: Sequence[float]
) -> None:
    """See `psyche_fast.kernels.lookahead`."""
    for part in plan.slices:
        direction = delta[part.start : part.stop].sign().to(plan.compute_dtype)
        signed_step(plan, part, parameters, direction, learning_rates)
