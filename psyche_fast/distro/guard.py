"""What of a parameter's gradient a step cannot use is refused: not finite, or sparse."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from psyche_fast.sharding import local_tensor

logger = logging.getLogger(__name__)


class GradientGuard:
    """Leaves a step's gradients out whole where any element of them is not finite.

    One NaN in delta would stay there for good, and with it its chunk.

    Attributes:
        refused: 0-d int64 on the device, in how many steps the gradients were left out.

    Args:
        parameters: all of them, in one order on all ranks; the first one's device has the counter.
        what: the optimiser's name, for the warning.
    """

    def __init__(self, parameters: Sequence[Tensor], what: str) -> None:
        device = parameters[0].device if parameters else torch.device("cpu")
        self.refused = torch.zeros((), dtype=torch.int64, device=device)
        meshes = {p.device_mesh: None for p in parameters if isinstance(p, DTensor)}
        self._groups = [group for mesh in meshes for group in mesh.get_all_groups()]
        self._what = what
        self._warned = False
        self._copy: tuple[Tensor, torch.cuda.Event] | None = None

    def scale(self, gradients: Iterable[Tensor | None], scale: float | Tensor | None) -> Tensor:
        """`scale` where all gradients are finite, else NaN; nothing waits for the device.

        A collective of the ranks that hold parts of the parameters, where these are distributed.

        Args:
            gradients: the step's.
            scale: factor on them; None for 1.

        Returns:
            float32, 0-d.
        """
        local = [local_tensor(g) for g in gradients if g is not None]
        # The largest magnitude, NaN if any is, rather than a sum, which finite ones could overflow.
        largest = get_total_norm([g for g in local if g.numel()], math.inf)
        finite = largest.to(self.refused.device).isfinite().float()
        for group in self._groups:
            dist.all_reduce(finite, dist.ReduceOp.MIN, group=group)
        factor = torch.as_tensor(1.0 if scale is None else scale, dtype=torch.float32)
        factor = factor.to(finite.device, non_blocking=True).where(finite > 0, torch.nan)
        self.count(factor)
        self._warn()
        return factor

    def count(self, factor: Tensor) -> None:
        """Count a step whose gradients are left out because `factor` is not finite."""
        self.refused += ~factor.isfinite()

    def _warn(self) -> None:
        if self._warned:
            return
        count = self.refused
        if count.device.type == "cuda":
            # The last step's, if it is known by now: the device is not waited for.
            last = self._copy
            if last is not None and not last[1].query():
                return
            pinned = torch.zeros((), dtype=torch.int64, pin_memory=True)
            self._copy = pinned.copy_(count, non_blocking=True), torch.cuda.Event()
            self._copy[1].record()
            count = pinned.new_zeros(()) if last is None else last[0]
        if int(count):
            self._warned = True
            logger.warning(
                "%s: a gradient was not finite; such a step's gradients are left out whole, and "
                "`refused` counts them",
                self._what,
            )


def check_dense(name: str, gradient: Tensor | None) -> None:
    """Check that a gradient has an element for each of the parameter's.

    Raises:
        TypeError: it is sparse; the parameter is named.
    """
    if gradient is not None and gradient.layout != torch.strided:
        raise TypeError(
            f"parameter {name} has a sparse gradient ({gradient.layout}), wanted a dense one: "
            "nn.Embedding gives it with sparse=False"
        )
