"""Gradients that a step cannot use, which all ranks of a replica leave out alike."""

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
        groups: of the meshes that parameters are distributed over, by dimension.

    Args:
        parameters: all of them, in one order on all ranks; the first one's device has the counter.
        what: the optimiser's name, for the warning.
    """

    def __init__(self, parameters: Sequence[Tensor], what: str) -> None:
        device = parameters[0].device if parameters else torch.device("cpu")
        self.refused = torch.zeros((), dtype=torch.int64, device=device)
        meshes = {p.device_mesh: None for p in parameters if isinstance(p, DTensor)}
        self.groups = [group for mesh in meshes for group in mesh.get_all_groups()]
        self._what = what
        self._warned = False
        self._copy: Tensor | None = None

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
        finite = _all_finite([g for g in local if g.numel()], self.refused.device)
        for group in self.groups:
            dist.all_reduce(finite, dist.ReduceOp.MIN, group=group)
        if isinstance(scale, Tensor):
            factor = scale.to(finite.device, torch.float32, non_blocking=True)
        else:  # made where it is used: a copy from the host would wait for the device
            factor = torch.full_like(finite, 1.0 if scale is None else scale)
        factor = factor.where(finite > 0, torch.nan)
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
            # What has arrived of an earlier step's, old or new: the device is not waited for.
            if self._copy is None:
                self._copy = torch.zeros((), dtype=torch.int64, pin_memory=True)
            seen = int(self._copy)
            self._copy.copy_(count, non_blocking=True)
        else:
            seen = int(count)
        if seen:
            self._warned = True
            logger.warning(
                "%s: a gradient was not finite; such a step's gradients are left out whole, and "
                "`refused` counts them",
                self._what,
            )


def _all_finite(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """1 where every element is finite, else 0: float32, 0-d on `device`."""
    # Several times as fast on a CPU as magnitudes; only sums of huge numbers need these as well.
    if device.type == "cpu" and math.isfinite(
        sum(float(t.sum(dtype=torch.float32)) for t in tensors)
    ):
        return torch.ones((), device=device)
    # The largest magnitude, NaN if any is, rather than a sum, which finite ones could overflow.
    return get_total_norm(tensors, math.inf).to(device).isfinite().float()


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
