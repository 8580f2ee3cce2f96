"""The three optimisers of the protocol behind one face, in the order of Psyche's train loop.

``train`` calls ``before_forward`` and ``after_backward``; ``optimize`` calls ``step``.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from psyche_fast import config
from psyche_fast.distro import Distro, DistroResult, exchange
from psyche_fast.distro.message import MessageFormat, Unpacking
from psyche_fast.kernels.plan import Entries
from psyche_fast.rank.gradients import drop_gradients, gradients, scale_

log = logging.getLogger(__name__)

Results = list[list[DistroResult]]


class Optimizer:
    """One rank's optimiser over named parameters. This one is Psyche's ``Dummy``: no change."""

    bytes_sent: int = 0
    """Bytes of this rank's contribution to the last exchange."""

    def before_forward(self, prev_lr: float) -> None:
        """Brings the parameters to where the gradient is wanted."""

    def receive(self) -> None:
        """Takes in what has come from other ranks; waits for nothing and changes no parameter.

        To be called between forwards and backwards, as often as one likes.
        """

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
        **momentum: Any,
    ) -> None:
        """Takes the parameters by name.

        Args:
            parameters: by name.
            settings: the protocol's.
            peers: this rank's counterparts in the other replicas.
            exchanges: whether ranks keep and exchange their own results.
            **momentum: ``delta_dtype`` and ``offload_delta`` of ``Distro``.
        """
        self._distro = Distro(
            parameters,
            compression_decay=settings.compression_decay,
            compression_chunk=settings.compression_chunk,
            compression_topk=settings.compression_topk,
            weight_decay=settings.weight_decay or 0.0,
            fused=True,
            **momentum,
        )
        self._peers = peers
        # Psyche's rank 0 knows results over whole parameters only.
        self._shared = any(isinstance(p, DTensor) for p in parameters.values())
        self._format: MessageFormat | None = None
        if exchanges:
            self._format = MessageFormat(
                self._distro.layout, self._distro.backends, signs=settings.quantize_1bit
            )
        self._own: list[Entries] | None = None
        self._pending: deque[exchange.Pending] = deque()
        self._unpacking: Unpacking | None = None  # what was the first of those

    def before_forward(self, prev_lr: float) -> None:
        """Look-ahead."""
        self._distro.error_correction(prev_lr)

    def receive(self) -> None:
        """Begins to unpack the previous step's results as soon as all of them are there.

        Then they are checked long before `step` asks, and on a GPU the host launches what follows
        the backward while that still runs. When it happens depends on the link, what comes of it
        does not.
        """
        if self._unpacking is None and self._pending and self._pending[0].completed():
            self._begin_unpack()

    def _begin_unpack(self) -> None:
        assert self._format is not None
        self._unpacking = self._format.begin_unpack(self._pending.popleft().wait())

    def after_backward(
        self, results: Results, prev_lr: float, lr: float, factor: Tensor
    ) -> list[DistroResult]:
        """Generates this step's result and, where ranks exchange, sends it on its way."""
        if self._format is None:
            if self._shared:
                results = [self._distro.own_results(own) for own in results]
            own = self._distro.generate(results, prev_lr, lr, grad_scale=factor)
            return self._distro.whole_results(own) if self._shared else own
        assert not results, "own results are kept by the ranks"
        self.receive()  # the last moment at which the device still has something to do
        self._own = self._distro.compress(self._own, lr, grad_scale=factor)
        pending = exchange.start(self._format.pack(self._own), self._peers)
        self._pending.append(pending)
        self.bytes_sent = pending.bytes_sent
        return []

    def step(self, results: Results | None, lr: float) -> None:
        """Applies the previous step's results of all peers.

        What a replica has sent that cannot be right is left out, with a warning that names it. All
        replicas have received the same, so that all leave it out.

        Raises:
            ValueError: no result is there to be applied, or one from rank 0 is malformed.
        """
        if results is not None:
            if self._shared:
                results = [self._distro.own_results(peer) for peer in results]
            self._distro.apply(results, lr)
            return
        if len(self._pending) + (self._unpacking is not None) < 2:
            raise ValueError("optimize: the first train's results are applied after the next")
        if self._unpacking is None:
            self._begin_unpack()
        assert self._unpacking is not None
        entries, faults = self._unpacking.result()
        self._unpacking = None
        for replica, what in faults.items():
            log.warning("the result of replica %d is refused: %s", replica, what)
        if entries is not None:
            self._distro.update(entries, lr)

    def plain(self) -> None:
        """Undoes the look-ahead, in which the parameters are between steps."""
        self._distro.plain()

    def zero(self) -> None:
        """Zeroes delta; what was in it is no longer to be taken out of it."""
        self._distro.zero_optim()
        self._own = None

    def momentum(self) -> Mapping[str, Tensor]:
        """Delta."""
        return self._distro.deltas()


def make_optimizer(
    settings: config.OptimizerConfig,
    parameters: Mapping[str, Tensor],
    peers: dist.ProcessGroup | None,
    exchanges: bool,
    **momentum: Any,
) -> Optimizer:
    """Builds the optimiser that the hyperparameters name; see ``DistroOptimizer``."""
    if isinstance(settings, config.Distro):
        return DistroOptimizer(parameters, settings, peers, exchanges, **momentum)
    if isinstance(settings, config.AdamW):
        return AdamWOptimizer(parameters, settings)
    return Optimizer()
