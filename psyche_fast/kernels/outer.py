"""The linear outer step: the replicas' mean into what they share, and that into their own.

One pass over all parameters of a chunk class: SGD, or Nesterov's momentum, and then the mix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from psyche_fast.kernels.backends import implementation
from psyche_fast.kernels.plan import ChunkPlan, Entries


@dataclass(frozen=True)
class Local:
    """A replica's own parameters, and what becomes of them once the shared ones have changed.

    `local = mix * local + (1 - mix) * shared`, or with `since` `local = local - since + shared`.

    Attributes:
        tensors: one per member, of the shared ones' dtype, written to.
        mix: share of the own ones that is kept.
        since: what the own ones were when this replica's result was sent.
    """

    tensors: Sequence[Tensor]
    mix: float = 0.0
    since: Sequence[Tensor] | None = None


def outer(
    plan: ChunkPlan,
    shared: Sequence[Tensor],
    received: Entries | Tensor,
    length: float,
    *,
    replicas: int | None = None,
    momenta: Sequence[Tensor] | None = None,
    momentum: float = 0.0,
    local: Local | None = None,
    backend: str = "torch",
) -> None:
    """`shared -= length * M`, or with momenta `u = momentum u + M; shared -= length (M + momentum u)`.

    Args:
        plan: the chunk class.
        shared: one tensor per member, in the compute dtype, updated in place.
        received: the replicas' entries side by side; or all values of each, `[replicas, chunks,
            h * w]` in the compute dtype, without transform.
        length: of the step.
        replicas: M is the sum of a coefficient's entries divided by this; None for the mean over
            those that name it. Of values it is the mean.
        momenta: `u`, one tensor per member, updated in place; None for SGD.
        momentum: see above.
        local: the replica's own parameters; None where there are none.
        backend: resolved backend name.

    Raises:
        ValueError: a tensor of another shape, dtype or device than the class (Triton backends).
        RuntimeError: the class is in use on another CUDA stream.
    """  # noqa: E501 - a formula
    assert isinstance(received, Entries) or not plan.is_transformed
    implementation(backend, "outer").outer(
        plan, shared, received, length, replicas, momenta, momentum, local
    )
