"""The optimisers of the protocol behind one face, in the order of Psyche's train loop.

`train` calls `look_ahead`, `receive` and `after_backward`; `optimize` calls `step`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from psyche_fast import config
from psyche_fast.distro import DistroResult, DistroStep
from psyche_fast.distro.exchange import Exchange
from psyche_fast.distro.message import MessageFormat
from psyche_fast.distro.results import collect, collect_own, to_results
from psyche_fast.kernels.plan import Entries
from psyche_fast.rank.gradients import drop_gradients, gradients, scale_

Results = list[list[DistroResult]]


class Optimizer:
    """One rank's optimiser over named parameters. This one is Psyche's `Dummy`: no change."""

    @property
    def bytes_sent(self) -> int:
        """Bytes of this rank's contribution to the last exchange."""
        return 0

    def look_ahead(self, prev_lr: float) -> None:
        """Bring the parameters to where the gradient is wanted."""

    def receive(self) -> None:
        """Begin with what has come from other ranks; waits for nothing, changes no parameter.

        To be called between forwards and backwards, as often as one likes.
        """

    def after_backward(
        self, results: Results, prev_lr: float, lr: float, factor: Tensor
    ) -> list[DistroResult]:
        """Take up the gradients.

        Args:
            results: own results of the previous step as rank 0 sent them; empty otherwise.
            prev_lr: learning rate of the previous step.
            lr: learning rate of this step.
            factor: what to multiply the gradients by (clipping), 0-d on their device. NaN where
                the gradients are not to be used at all.

        Returns:
            This step's result, where it is for rank 0 to send on.
        """
        return []

    def step(self, results: Results | None, lr: float) -> None:
        """Change the parameters.

        Args:
            results: all peers' results of the previous step as rank 0 sent them; None where the
                ranks exchange them themselves.
            lr: learning rate of this step.

        Raises:
            ValueError: there is no result to apply, or one is malformed.
        """

    def settle(self) -> None:
        """Wait until nothing is under way between ranks: before checkpoints and at the end."""

    def plain(self) -> None:
        """Make the parameters what a checkpoint wants: without look-ahead, with weight decay."""

    def zero_momentum(self) -> None:
        """Forget the momentum where the optimiser can."""

    def momentum(self) -> Mapping[str, Tensor]:
        """The momentum by parameter name, for statistics."""
        return {}


class AdamWOptimizer(Optimizer):
    """`torch.optim.AdamW`, fused where torch can."""

    def __init__(self, parameters: Mapping[str, Tensor], settings: config.AdamW) -> None:
        """Take the parameters by name."""
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
        """Clip, or refuse the gradient; the step itself is for `step`."""
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
        """Take AdamW's step."""
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)

    def zero_momentum(self) -> None:
        """Forget both moments and the step count."""
        self._adamw.state.clear()

    def momentum(self) -> Mapping[str, Tensor]:
        """AdamW's first moment."""
        return {self._names[id(p)]: s["exp_avg"] for p, s in self._adamw.state.items()}


class ExchangedDistro(DistroStep, Optimizer):
    """DisTrO whose results the replicas exchange among themselves, rank by rank."""

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        peers: dist.ProcessGroup | None,
        *,
        signs: bool,
        **options: Any,
    ) -> None:
        """Agree on groups; a collective of all ranks.

        Args:
            parameters: by name.
            peers: this rank's counterparts in the other replicas.
            signs: send only the values' signs.
            **options: those of `DistroStep`.
        """
        super().__init__(parameters, **options)
        form = MessageFormat(self.layout, self.backends, signs=signs)
        # All ranks, not the peers alone: what tensor parallelism replicates is every rank's.
        agreement = None if peers is None else dist.new_group(backend="gloo")
        assert agreement is None or isinstance(agreement, dist.ProcessGroup)
        self._exchange = Exchange(form, peers, agreement)
        self._own: list[Entries] | None = None

    @property
    def bytes_sent(self) -> int:
        """Size of this rank's last message."""
        return self._exchange.bytes_sent

    def receive(self) -> None:
        """Begin to unpack the previous step's results as soon as they are there.

        Then they are checked long before `step` asks, and on a GPU the host launches what follows
        the backward while that still runs. When it happens depends on the link, what comes of it
        does not.
        """
        self._exchange.poll()

    def after_backward(
        self, results: Results, prev_lr: float, lr: float, factor: Tensor
    ) -> list[DistroResult]:
        """Compress, and send what comes of it on its way."""
        assert not results, "own results are kept by the ranks"
        self._exchange.poll()  # the last moment at which the device still has something to do
        self._own = self.compress(self._own, lr, grad_scale=factor)
        self._exchange.send(self._own)
        return []

    def step(self, results: Results | None, lr: float) -> None:
        """Apply the previous step's results of all replicas."""
        assert results is None, "results are exchanged by the ranks"
        if len(self._exchange) < 2:
            raise ValueError("optimize: the first train's results are applied after the next")
        entries = self._exchange.receive()
        if entries is not None:
            self.update(entries, lr)

    def settle(self) -> None:
        """Wait for results under way."""
        self._exchange.settle()

    def zero_momentum(self) -> None:
        """Zero delta; what was in it is no longer to be taken out of it."""
        super().zero_momentum()
        self._own = None


class PsycheDistro(DistroStep, Optimizer):
    """DisTrO whose results rank 0 sends and takes: Psyche's way, over whole parameters."""

    def after_backward(
        self, results: Results, prev_lr: float, lr: float, factor: Tensor
    ) -> list[DistroResult]:
        """Compress."""
        previous = collect_own([self.parts.own_results(own) for own in results], self.layout)
        own = to_results(self.layout, self.compress(previous, lr, grad_scale=factor))
        return self.parts.whole_results(own)

    def step(self, results: Results | None, lr: float) -> None:
        """Apply the results of all peers."""
        if results is None:
            raise ValueError("optimize: there are no results to apply")
        if results:
            own = [self.parts.own_results(peer) for peer in results]
            self.update(collect(own, self.layout), lr)


def make_optimizer(
    settings: config.OptimizerConfig,
    parameters: Mapping[str, Tensor],
    peers: dist.ProcessGroup | None,
    exchanges: bool,
    **momentum: Any,
) -> Optimizer:
    """Build the optimiser that the hyperparameters name; a collective where ranks exchange.

    Args:
        settings: the protocol's.
        parameters: by name.
        peers: this rank's counterparts in the other replicas.
        exchanges: whether ranks keep and exchange their own results.
        **momentum: `delta_dtype` and `offload_delta` of DisTrO.
    """
    if isinstance(settings, config.AdamW):
        return AdamWOptimizer(parameters, settings)
    if not isinstance(settings, config.Distro):
        return Optimizer()
    options = {
        "compression_decay": settings.compression_decay,
        "compression_chunk": settings.compression_chunk,
        "compression_topk": settings.compression_topk,
        "weight_decay": settings.weight_decay or 0.0,
        **momentum,
    }
    if exchanges:
        return ExchangedDistro(parameters, peers, signs=settings.quantize_1bit, **options)
    return PsycheDistro(parameters, **options)
