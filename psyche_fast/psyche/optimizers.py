"""The optimisers of Psyche's core on a further rank: the same arithmetic and the same collectives.

Each rank steps its shards on its own, by the same operators on the same (distributed) tensors: a
gradient may be placed otherwise than its parameter, and what follows from that has to be the same.
Of DisTrO a further rank is the receiving half: rank 0 alone
compresses and decodes, and what it decodes comes in scatters, one for each parameter. Parameters
that are not split (norms and embeddings beside tensor parallelism) each rank updates by itself, bit
by bit as rank 0 does: nothing brings them together again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from psyche_fast.distro import DistroResult
from psyche_fast.psyche import dtensor_helpers, messages
from psyche_fast.psyche.decoding import decode
from psyche_fast.sharding import full_tensor, local_tensor

Results = Sequence[Sequence[DistroResult]]
"""One list over the parameters, in name order, from each peer."""


class Optimizer:
    """One rank's optimiser; this one changes nothing (Psyche's `Dummy`). All run under no_grad."""

    def before_batch(self, prev_lr: float) -> None:
        """Bring the parameters to where the gradient is wanted."""

    def after_batch(self, previous: Results, prev_lr: float, lr: float) -> None:
        """Take up the gradients; `previous` are rank 0's results of the step before."""

    def step(self, results: Results, lr: float) -> None:
        """Change the parameters; `results` are all peers'."""

    def zero(self) -> None:
        """Forget the momentum where the optimiser can."""


def make_optimizer(obj: object, parameters: Sequence[Tensor]) -> Optimizer:
    """The optimiser of the core's JSON.

    Args:
        obj: see `messages.read_optimizer`.
        parameters: in name order.

    Raises:
        ValueError: see `messages.read_optimizer`.
    """
    options = messages.read_optimizer(obj)
    if isinstance(options, messages.AdamW):
        return _AdamW(parameters, options)
    if isinstance(options, messages.Distro):
        return _ReceivedDistro(parameters, options)
    return Optimizer()


def _clip(parameters: Sequence[Tensor], limit: float | None) -> None:
    """One all-reduce of a vector over the parameters that are split and have gradients."""
    if limit is not None and limit > 0:
        # The core hands its list over backwards, which is the vector's order.
        torch.nn.utils.clip_grad_norm_(list(reversed(parameters)), _single(limit))


def _scale_(tensor: Tensor, factor: float) -> Tensor:
    """Multiplies in place as C++ does: the factor is rounded to the tensor's type first.

    Python's `mul_` keeps the factor in single precision.
    """
    scaled: Tensor = torch.ops.aten.mul_.Scalar(tensor, factor)
    return scaled


def _single(number: float) -> float:
    """The core keeps such numbers in single precision, whatever its JSON says."""
    return float(np.float32(number))


class _AdamW(Optimizer):
    """Libtorch's C++ AdamW, operation by operation (`torch.optim.AdamW` rounds otherwise)."""

    def __init__(self, parameters: Sequence[Tensor], options: messages.AdamW) -> None:
        self._parameters = parameters
        self._limit = options.clip_grad_norm
        self._betas = _single(options.betas[0]), _single(options.betas[1])
        self._eps, self._decay = _single(options.eps), _single(options.weight_decay)
        self._moments: dict[int, tuple[Tensor, Tensor]] = {}
        self._steps: dict[int, int] = {}

    def step(self, results: Results, lr: float) -> None:
        """Clip, step what has a gradient, and drop the gradients."""
        _clip(self._parameters, self._limit)
        beta1, beta2 = self._betas
        for number, parameter in enumerate(self._parameters):
            if parameter.grad is None:
                continue
            value, grad = parameter, parameter.grad
            if self._decay != 0.0:
                _scale_(value, 1 - lr * self._decay)
            if number not in self._moments:
                self._moments[number] = torch.zeros_like(value), torch.zeros_like(value)
            mean, square = self._moments[number]
            steps = self._steps[number] = self._steps.get(number, 0) + 1
            _scale_(mean, beta1).add_(grad, alpha=1 - beta1)
            _scale_(square, beta2).addcmul_(grad, grad, value=1 - beta2)
            root = math.sqrt(1 - beta2**steps)
            divisor = torch.ops.aten.div.Scalar(square.sqrt(), root)
            divisor = torch.ops.aten.add_.Scalar(divisor, self._eps)
            value.addcdiv_(mean, divisor, value=-(lr / (1 - beta1**steps)))
            parameter.grad = None


class _ReceivedDistro(Optimizer):
    """DisTrO without the compression, whose outcome rank 0 alone uses."""

    def __init__(self, parameters: Sequence[Tensor], options: messages.Distro) -> None:
        self._parameters = parameters
        self._limit = options.clip_grad_norm
        self._decay = _single(options.weight_decay or 0.0)
        self._momentum_decay = _single(options.compression_decay)
        self._deltas = [torch.zeros_like(p.detach()) for p in parameters]

    def zero(self) -> None:
        """Zero the momentum."""
        for delta in self._deltas:
            delta.zero_()

    def before_batch(self, prev_lr: float) -> None:
        """Look ahead."""
        for parameter, delta in zip(self._parameters, self._deltas, strict=True):
            parameter.sub_(delta.sign() * prev_lr)

    def after_batch(self, previous: Results, prev_lr: float, lr: float) -> None:
        """Clip, and take the gradients into the momentum, which rank 0 gathers.

        Raises:
            ValueError: a result is not of these parameters.
        """
        self._check(previous)
        _clip(self._parameters, self._limit)
        for number, (value, delta) in enumerate(zip(self._parameters, self._deltas, strict=True)):
            value.add_(delta.sign() * prev_lr)
            if previous:
                sent = self._decoded(number, previous)
                if isinstance(value, DTensor):
                    sent = dtensor_helpers.calculate_local_tensor_from_full(sent, value)
                delta.sub_(sent)
            if self._decay != 0.0:
                _scale_(value, 1.0 - lr * self._decay)
            if self._momentum_decay != 1.0:
                _scale_(delta, self._momentum_decay)
            assert value.grad is not None, "a backward has been"
            delta.add_(torch.ops.aten.mul.Scalar(value.grad, lr))
            full_tensor(delta)

    def step(self, results: Results, lr: float) -> None:
        """Step by the sign of the peers' mean; no results change nothing.

        Raises:
            ValueError: a result is not of these parameters, or there has been no backward yet.
        """
        self._check(results)
        if not results:
            return
        for number, parameter in enumerate(self._parameters):
            dtensor_helpers.set_grad(parameter, self._decoded(number, results))
            assert parameter.grad is not None
            parameter.grad.sign_()
        for parameter in self._parameters:
            assert parameter.grad is not None
            parameter.add_(parameter.grad, alpha=-lr)
            dtensor_helpers.zero_grad(parameter)

    def _check(self, results: Results) -> None:
        for peer, own in enumerate(results):
            if len(own) != len(self._parameters):
                raise ValueError(
                    f"results_metadata: peer {peer} has {len(own)} results, the model "
                    f"{len(self._parameters)} parameters"
                )

    def _decoded(self, number: int, results: Results) -> Tensor:
        """The peers' mean, whole; of a split parameter only memory for it: rank 0's is used."""
        parameter = self._parameters[number]
        if isinstance(parameter, DTensor):
            local = local_tensor(parameter)
            return torch.empty(parameter.shape, dtype=local.dtype, device=local.device)
        return decode([own[number] for own in results], parameter.dtype, parameter.device)
