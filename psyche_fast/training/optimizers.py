"""The three optimisers of the protocol behind one face, in the order of Psyche's train loop.

``train`` calls ``before_forward`` and ``after_backward``; ``optimize`` calls ``step``.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from psyche_fast import config
from psyche_fast.collectives import exchange
from psyche_fast.distro import Distro, DistroResult, quantize_1bit
from psyche_fast.training.gradients import drop_gradients, gradients, scale_

Results = list[list[DistroResult]]


class Optimizer:
    """One rank's optimiser over named parameters. This one is Psyche's ``Dummy``: no change."""

    bytes_sent: int = 0
    """Bytes of this rank's contribution to the last exchange."""

    def before_forward(self, prev_lr: float) -> None:
        """Brings the parameters to where the gradient is wanted."""

    def after_backward(
        self, results: Results, prev_lr: float, lr: float, factor: Tensor
    ) -> list[DistroResult]:
        """Takes the gradients over.

        Args:
            results: own results of the previous step as rank 0 sent them; empty otherwise.
            prev_lr: learning rate of the previous step.
            lr: learning rate of this step.
            factor: what to multiply the gradients by (clipping), 0-d on their device. NaN where
                the gradients are not to be used at all.

        Returns:
            This step's result, where the optimiser has one.
        """
        return []

    def step(self, results: Results | None, lr: float) -> None:
        """Changes the parameters.

        Args:
            results: all peers' results of the previous step; None for those exchanged by the
                ranks themselves.
            lr: learning rate of this step.
        """

    def plain(self) -> None:
        """Makes the parameters what a checkpoint wants: without look-ahead, with weight decay."""

    def zero(self) -> None:
        """Forgets the momentum where the optimiser can."""

    def momentum(self) -> Mapping[str, Tensor]:
        """The momentum by parameter name, for statistics."""
        return {}


class AdamWOptimizer(Optimizer):
    """``torch.optim.AdamW``, fused where torch can."""

    def __init__(self, parameters: Mapping[str, Tensor], settings: config.AdamW) -> None:
        """Takes the parameters by name."""
        # One group per mesh: torch's fused and foreach paths refuse a mixture of plain tensors
        # and DTensors, or of DTensors of two meshes, inside one group.
        groups: dict[object, list[Tensor]] = {}
        for parameter in parameters.values():
            key = parameter.device_mesh if isinstance(parameter, DTensor) else None
            groups.setdefault(key, []).append(parameter)
        self._adamw = torch.optim.AdamW(
            [{"params": group} for group in groups.values()],
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self._names = {id(p): name for name, p in parameters.items()}
        self._parameters = list(parameters.values())

    def after_backward(
        self, results: Results, prev_lr: float, lr: float, factor: Tensor
    ) -> list[DistroResult]:
        """Clips, or refuses the gradient; the step itself is ``step``'s."""
        scale = float(factor)  # the step's one wait for the device: AdamW cannot refuse there
        if not math.isfinite(scale):
            drop_gradients(self._parameters)
            return []
        scale_(gradients(self._parameters), scale)
        for parameter in self._parameters:
            # fused AdamW takes gradients of the parameters' own type only
            if parameter.grad is not None and parameter.grad.dtype != parameter.dtype:
                parameter.grad = parameter.grad.to(parameter.dtype)
        return []

    def step(self, results: Results | None, lr: float) -> None:
        """AdamW's step."""
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)

    def zero(self) -> None:
        """Forgets both moments and the step count."""
        self._adamw.state.clear()

    def momentum(self) -> Mapping[str, Tensor]:
        """AdamW's first moment."""
        return {self._names[id(p)]: s["exp_avg"] for p, s in self._adamw.state.items()}


class DistroOptimizer(Optimizer):
    """DisTrO: results from rank 0 (Psyche's way), or exchanged among the replicas themselves."""

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        settings: config.Distro,
        peers: dist.ProcessGroup | None,
        exchanges: bool,
    ) -> None:
        """Takes the parameters by name.

        Args:
            parameters: by name.
            settings: the protocol's.
            peers: this rank's counterparts in the other replicas.
            exchanges: whether ranks keep and exchange their own results.
        """
        self._distro = Distro(
            parameters,
            compression_decay=settings.compression_decay,
            compression_chunk=settings.compression_chunk,
            compression_topk=settings.compression_topk,
            weight_decay=settings.weight_decay or 0.0,
            fused=True,
        )
        self._quantize = settings.quantize_1bit
        self._peers = peers
        self._exchanges = exchanges
        # Psyche's rank 0 knows results over whole parameters only.
        self._shared = any(isinstance(p, DTensor) for p in parameters.values())
        self._own: list[DistroResult] = []
        self._pending: deque[tuple[list[DistroResult], exchange.Pending]] = deque()

    def before_forward(self, prev_lr: float) -> None:
        """Look-ahead."""
        self._distro.error_correction(prev_lr)

    def after_backward(
        self, results: Results, prev_lr: float, lr: float, factor: Tensor
    ) -> list[DistroResult]:
        """Generates this step's result and, where ranks exchange, sends it on its way."""
        if self._exchanges and self._own:
            assert not results, "own results are kept by the ranks"
            results = [self._own]
        elif self._shared:
            results = [self._distro.own_results(own) for own in results]
        own = self._distro.generate(results, prev_lr, lr, grad_scale=factor)
        if self._exchanges:
            self._own = own
            sent = quantize_1bit(own) if self._quantize else own
            tensors = [t for r in sent for t in (r.sparse_idx, r.sparse_val)]
            pending = exchange.start(tensors, self._peers)
            self._pending.append((sent, pending))
            self.bytes_sent = pending.bytes_sent
        elif self._shared:
            own = self._distro.whole_results(own)
        return own

    def step(self, results: Results | None, lr: float) -> None:
        """Applies the previous step's results of all peers.

        Raises:
            ValueError: no result is there to be applied, or one is malformed.
        """
        if results is None:
            if len(self._pending) < 2:
                raise ValueError("optimize: the first train's results are applied after the next")
            own, pending = self._pending.popleft()
            results = [_like(own, tensors) for tensors in pending.wait()]
        elif self._shared:
            results = [self._distro.own_results(peer) for peer in results]
        self._distro.apply(results, lr)

    def plain(self) -> None:
        """Undoes the look-ahead, in which the parameters are between steps."""
        self._distro.plain()

    def zero(self) -> None:
        """Zeroes delta; what was in it is no longer to be taken out of it."""
        self._distro.zero_optim()
        self._own = []

    def momentum(self) -> Mapping[str, Tensor]:
        """Delta."""
        return self._distro.deltas()


def _like(own: list[DistroResult], tensors: list[Tensor]) -> list[DistroResult]:
    """A peer's results from its indices and values, one pair per parameter, cut as our own are."""
    return [
        replace(result, sparse_idx=idx, sparse_val=val)
        for result, idx, val in zip(own, tensors[::2], tensors[1::2], strict=True)
    ]


def make_optimizer(
    settings: config.OptimizerConfig,
    parameters: Mapping[str, Tensor],
    peers: dist.ProcessGroup | None,
    exchanges: bool,
) -> Optimizer:
    """Builds the optimiser that the hyperparameters name."""
    if isinstance(settings, config.Distro):
        return DistroOptimizer(parameters, settings, peers, exchanges)
    if isinstance(settings, config.AdamW):
        return AdamWOptimizer(parameters, settings)
    return Optimizer()
