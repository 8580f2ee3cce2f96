"""The local steps, and the outer ones: what becomes of the mean of all replicas."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from psyche_fast.methods.method import SGD, AdamW, Method, Muon, Nesterov, Sign
from psyche_fast.methods.muon import Matrices, MuonAdamW, is_hidden_matrix, rate_factor
from psyche_fast.sharding import local_tensor, placed_like


def optimizer_of(
    options: AdamW | Muon, named: Mapping[str, Tensor], undecayed: Container[str] = ()
) -> torch.optim.Optimizer:
    """The optimiser of options over named parameters, some of them without weight decay."""
    if isinstance(options, Muon):
        return MuonAdamW(named.items(), options=options, undecayed=undecayed)
    groups: dict[float, list[tuple[str, Tensor]]] = {}
    for name, p in named.items():
        decay = 0.0 if name in undecayed else options.weight_decay
        groups.setdefault(decay, []).append((name, p))
    return torch.optim.AdamW(
        [{"params": pairs, "weight_decay": decay} for decay, pairs in groups.items()],
        betas=options.betas,
        eps=options.eps,
    )


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give all of an optimiser's groups a learning rate."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


class Stepped:
    """An optimiser, by its options, of tensors of which this rank may have shards.

    Args:
        options: the optimiser's.
        named: plain tensors and DTensors by name, changed in place.
        undecayed: names of those without weight decay.

    Attributes:
        optimizer: of this rank's parts; Muon's of the tensors themselves, which are one by one
            whole matrices.
    """

    def __init__(
        self, options: AdamW | Muon, named: Mapping[str, Tensor], undecayed: Container[str] = ()
    ) -> None:
        self._named = dict(named)
        # AdamW goes by elements: plain tensors spare it what DTensor does around each operation.
        self._tensors = {
            name: t if isinstance(options, Muon) else local_part(t) for name, t in named.items()
        }
        self.optimizer = optimizer_of(options, self._tensors, undecayed)

    @torch.no_grad()
    def step(self, gradients: Mapping[str, Tensor | None], rate: float) -> None:
        """One step.

        Args:
            gradients: this rank's parts, in the tensors' type.
            rate: the learning rate.
        """
        set_rate(self.optimizer, rate)
        before = [tensor.grad for tensor in self._tensors.values()]
        for name, tensor in self._tensors.items():
            if isinstance(self._named[name], DTensor) and not isinstance(tensor, DTensor):
                tensor.data = local_tensor(self._named[name].detach())  # FSDP2 may have moved it
            gradient = gradients.get(name)
            if isinstance(tensor, DTensor) and gradient is not None:
                gradient = placed_like(gradient, tensor)
            tensor.grad = gradient
        self.optimizer.step()
        for tensor, given in zip(self._tensors.values(), before, strict=True):
            tensor.grad = given


class OuterStep:
    """The outer step on the shared parameters.

    Args:
        method: whose.
        shared: the parameters by name, of which this rank may have shards; changed in place.
        undecayed: names of those without weight decay.
    """

    def __init__(
        self, method: Method, shared: Mapping[str, Tensor], undecayed: Container[str] = ()
    ) -> None:
        self._method, self._shared = method, dict(shared)
        self._decayed = [t for name, t in self._shared.items() if name not in undecayed]
        self._momentum: dict[str, Tensor] = {}
        self._stepped: Stepped | None = None
        self._matrices: dict[tuple[str, ...], Matrices] = {}
        outer = method.outer
        if isinstance(outer, Nesterov):
            self._momentum = {
                name: torch.zeros_like(local_part(t)) for name, t in self._shared.items()
            }
        elif isinstance(outer, AdamW) or (isinstance(outer, Muon) and method.what == "gradient"):
            self._stepped = Stepped(outer, self._shared, undecayed)

    @torch.no_grad()
    def decay(self, rate: float) -> None:
        """Decoupled weight decay, in every step; AdamW and Muon of gradients see to theirs."""
        if self.decays and self._decayed:
            factor = 1.0 - rate * (self._method.outer.weight_decay or 0.0)
            torch._foreach_mul_([local_part(t) for t in self._decayed], factor)

    @property
    def decays(self) -> bool:
        """Whether `decay` changes anything."""
        return self._stepped is None and bool(self._method.outer.weight_decay)

    def length(self, rate: float) -> float | None:
        """How long a linear step is; None of all others."""
        outer = self._method.outer
        if not isinstance(outer, SGD | Nesterov):
            return None
        return outer.rate * (rate if self._method.step_by_rate else 1.0)

    def momenta(self, names: Sequence[str]) -> tuple[list[Tensor] | None, float]:
        """Nesterov's momenta of parameters, this rank's parts, and their decay; or None, 0."""
        outer = self._method.outer
        if not isinstance(outer, Nesterov):
            return None, 0.0
        return [self._momentum[name] for name in names], outer.momentum

    @torch.no_grad()
    def step(self, merged: Mapping[str, Tensor], rate: float) -> None:
        """One step.

        Args:
            merged: the mean of what the replicas have sent, this rank's shards, for some of the
                parameters.
            rate: the schedule's learning rate.
        """
        outer, names = self._method.outer, list(merged)
        shared, means = [local_part(self._shared[n]) for n in names], list(merged.values())
        if self._stepped is not None:
            self._stepped.step(merged, rate)
        elif isinstance(outer, Muon):
            self._orthogonal(outer, names, shared, means, rate)
        elif isinstance(outer, Sign):
            torch._foreach_add_(shared, [mean.sign() for mean in means], alpha=-rate)
        else:
            assert isinstance(outer, SGD | Nesterov)
            length = self.length(rate)
            assert length is not None
            if isinstance(outer, Nesterov):
                momenta = [self._momentum[n] for n in names]
                torch._foreach_mul_(momenta, outer.momentum)
                torch._foreach_add_(momenta, means)
                means = list(torch._foreach_add(means, momenta, alpha=outer.momentum))
            torch._foreach_add_(shared, means, alpha=-length)

    def _orthogonal(
        self,
        outer: Muon,
        names: list[str],
        shared: list[Tensor],
        means: list[Tensor],
        rate: float,
    ) -> None:
        hidden = tuple(n for n in names if is_hidden_matrix(outer, n, self._shared[n]))
        if hidden not in self._matrices:
            self._matrices[hidden] = Matrices([self._shared[n] for n in hidden])
        of = dict(zip(names, means, strict=True))
        found = self._matrices[hidden].orthogonalise(outer, [of[n] for n in hidden])
        directions = dict(zip(hidden, found, strict=True))
        for name, tensor, mean in zip(names, shared, means, strict=True):
            if name in directions:
                factor = rate_factor(outer, self._shared[name].shape)
                tensor.add_(directions[name], alpha=-rate * factor)
            else:
                tensor.add_(mean.sign(), alpha=-rate)

    def state(self) -> dict[str, Any]:
        """Copies of this rank's parts; the same on all replicas."""
        state: dict[str, Any] = {
            "momentum": {name: tensor.clone() for name, tensor in self._momentum.items()}
        }
        if self._stepped is not None:
            state["optimizer"] = copied(self._stepped.optimizer.state_dict())
        return state

    def load(self, state: Mapping[str, Any]) -> None:
        """Take up what `state` gave.

        Raises:
            ValueError: it is another outer step's.
        """
        momentum, has_optimizer = state.get("momentum", {}), "optimizer" in state
        if set(momentum) != set(self._momentum) or has_optimizer != (self._stepped is not None):
            raise ValueError(
                f"the saved state is of another outer step than {self._method.outer!r}"
            )
        for name, tensor in momentum.items():
            self._momentum[name].copy_(tensor)
        if self._stepped is not None:
            self._stepped.optimizer.load_state_dict(copied(state["optimizer"]))


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, to be changed in place; a plain one itself."""
    return local_tensor(tensor.detach()) if isinstance(tensor, DTensor) else tensor


def copied(state: Any) -> Any:
    """A state of dicts, lists and tensors, its tensors copied; of DTensors this rank's parts."""
    if isinstance(state, Tensor):
        return local_tensor(state.detach()).clone()
    if isinstance(state, Mapping):
        return {key: copied(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(copied(value) for value in state)
    return state
