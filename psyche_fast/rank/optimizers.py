"""The optimisers behind one face, in the order of Psyche's train loop.

`Trainer.train` calls `before_forward` and `after_backward`; `Trainer.optimize` calls `step`.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from psyche_fast import config
from psyche_fast.distro import Distro, exchange
from psyche_fast.distro.message import MessageFormat, Unpacking
from psyche_fast.kernels.plan import Entries
from psyche_fast.rank.gradients import gradients, scale_

log = logging.getLogger(__name__)

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class Optimizer:
    """One rank's optimiser over named parameters. This one changes nothing."""

    bytes_sent: int = 0
    """Bytes of this rank's contribution to the last exchange."""

    def before_forward(self, prev_lr: float) -> None:
        """Brings the parameters to where the gradient is wanted."""

    def receive(self) -> None:
        """Takes in what has come from other ranks; waits for nothing and changes no parameter.

        To be called between forwards and backwards, as often as one likes.
        """

    def after_backward(self, prev_lr: float, lr: float, factor: Tensor) -> None:
        """Takes the gradients over.

        Args:
            prev_lr: learning rate of the previous step.
            lr: learning rate of this step.
            factor: what to multiply the gradients by (clipping), 0-d on their device. NaN where
                the gradients are not to be used at all.
        """

    def step(self, lr: float) -> None:
        """Changes the parameters.

        Args:
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
    """`torch.optim.AdamW`, fused."""

    def __init__(self, parameters: Mapping[str, Tensor], options: config.Optimizer) -> None:
        """Takes the parameters by name."""
        # One group per mesh: torch's fused and foreach paths refuse a mixture of plain tensors
        # and DTensors, or of DTensors of two meshes, inside one group.
        groups: dict[object, list[Tensor]] = {}
        for parameter in parameters.values():
            key = parameter.device_mesh if isinstance(parameter, DTensor) else None
            groups.setdefault(key, []).append(parameter)
        self._adamw = torch.optim.AdamW(
            [{"params": group} for group in groups.values()],
            betas=(options.beta1, options.beta2),
            eps=options.eps,
            weight_decay=options.weight_decay,
            fused=True,
        )
        self._names = {id(p): name for name, p in parameters.items()}
        self._parameters = list(parameters.values())

    def after_backward(self, prev_lr: float, lr: float, factor: Tensor) -> None:
        """Clips; what is to be refused `step` refuses, on the device."""
        # What mixed precision's loss scaler says of gradients that overflowed: the fused kernel
        # then changes neither parameters nor moments.
        self._adamw.found_inf = (~factor.isfinite()).float()  # type: ignore[attr-defined]
        scale_(gradients(self._parameters), factor)
        for parameter in self._parameters:
            # fused AdamW takes gradients of the parameters' own type only
            if parameter.grad is not None and parameter.grad.dtype != parameter.dtype:
                parameter.grad = parameter.grad.to(parameter.dtype)

    def step(self, lr: float) -> None:
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
    """DisTrO: replicas exchange their results among themselves and apply them one step late."""

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        options: config.Optimizer,
        peers: dist.ProcessGroup | None,
    ) -> None:
        """Takes the parameters by name.

        Args:
            parameters: by name.
            options: the run's.
            peers: this rank's counterparts in the other replicas.
        """
        self._distro = make_distro(parameters, options)
        self._peers = peers
        self._format = MessageFormat(
            self._distro.layout, self._distro.backends, signs=options.distro_quantization
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
        self._unpacking = self._format.begin_unpack(self._pending.popleft().wait())

    def after_backward(self, prev_lr: float, lr: float, factor: Tensor) -> None:
        """Generates this step's result and sends it on its way."""
        self.receive()  # the last moment at which the device still has something to do
        self._own = self._distro.compress(self._own, lr, grad_scale=factor)
        pending = exchange.start(self._format.pack(self._own), self._peers)
        self._pending.append(pending)
        self.bytes_sent = pending.bytes_sent

    def step(self, lr: float) -> None:
        """Applies the previous step's results of all peers; after the very first there are none.

        What a replica has sent that cannot be right is left out, with a warning that names it. All
        replicas have received the same, so that all leave it out.
        """
        if len(self._pending) + (self._unpacking is not None) < 2:
            return
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


def make_distro(parameters: Mapping[str, Tensor], options: config.Optimizer) -> Distro:
    """The state and arithmetic of DisTrO, however results travel."""
    return Distro(
        parameters,
        compression_decay=options.compression_decay,
        compression_chunk=options.compression_chunk,
        compression_topk=options.compression_topk,
        weight_decay=options.weight_decay,
        delta_dtype=_DTYPES[options.delta_dtype],
        offload_delta=options.offload_delta,
        fused=True,
    )


def make_optimizer(
    options: config.Optimizer,
    parameters: Mapping[str, Tensor],
    peers: dist.ProcessGroup | None,
) -> Optimizer:
    """The optimiser that the options name.

    Args:
        options: the run's.
        parameters: by name.
        peers: this rank's counterparts in the other replicas; None for one replica.
    """
    if options.distro:
        return DistroOptimizer(parameters, options, peers)
    return AdamWOptimizer(parameters, options)
