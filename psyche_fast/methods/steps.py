"""The local steps, and the outer ones: what becomes of the mean of all replicas."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor

from psyche_fast.methods.method import SGD, AdamW, Method, Muon, Nesterov, Sign
from psyche_fast.methods.muon import MuonAdamW, is_hidden_matrix, orthogonalise, rate_factor


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


class OuterStep:
    """The outer step on the shared parameters.

    Args:
        method: whose.
        shared: the parameters by name, changed in place.
        undecayed: names of those without weight decay.
    """

    def __init__(
        self, method: Method, shared: Mapping[str, Tensor], undecayed: Container[str] = ()
    ) -> None:
        self._method, self._shared = method, dict(shared)
        self._decayed = [t for name, t in self._shared.items() if name not in undecayed]
        self._momentum: dict[str, Tensor] = {}
        self._optimizer: torch.optim.Optimizer | None = None
        outer = method.outer
        if isinstance(outer, Nesterov):
            self._momentum = {name: torch.zeros_like(t) for name, t in self._shared.items()}
        elif isinstance(outer, AdamW) or (isinstance(outer, Muon) and method.what == "gradient"):
            self._optimizer = optimizer_of(outer, self._shared, undecayed)

    @torch.no_grad()
    def decay(self, rate: float) -> None:
        """Decoupled weight decay, in every step; AdamW and Muon of gradients see to theirs."""
        if self._optimizer is not None:
            return
        weight_decay = self._method.outer.weight_decay or 0.0
        if weight_decay != 0.0 and self._decayed:
            torch._foreach_mul_(self._decayed, 1.0 - rate * weight_decay)

    @torch.no_grad()
    def step(self, merged: Mapping[str, Tensor], rate: float) -> None:
        """One step.

        Args:
            merged: the mean of what the replicas have sent, for some of the parameters.
            rate: the schedule's learning rate.
        """
        outer, names = self._method.outer, list(merged)
        shared, means = [self._shared[n] for n in names], list(merged.values())
        if self._optimizer is not None:
            set_rate(self._optimizer, rate)
            for tensor, mean in zip(shared, means, strict=True):
                tensor.grad = mean
            self._optimizer.step()
            for tensor in shared:
                tensor.grad = None
        elif isinstance(outer, Muon):
            self._orthogonal(outer, names, shared, means, rate)
        elif isinstance(outer, Sign):
            torch._foreach_add_(shared, [mean.sign() for mean in means], alpha=-rate)
        else:
            assert isinstance(outer, SGD | Nesterov)
            length = outer.rate * (rate if self._method.step_by_rate else 1.0)
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
        hidden = [is_hidden_matrix(outer, n, t) for n, t in zip(names, shared, strict=True)]
        directions = iter(
            orthogonalise(outer, [m for m, is_one in zip(means, hidden, strict=True) if is_one])
        )
        for tensor, mean, is_one in zip(shared, means, hidden, strict=True):
            if is_one:
                tensor.add_(next(directions), alpha=-rate * rate_factor(outer, tensor.shape))
            else:
                tensor.add_(mean.sign(), alpha=-rate)

    def state(self) -> dict[str, Any]:
        """Copies; the same on all replicas."""
        state: dict[str, Any] = {
            "momentum": {name: tensor.clone() for name, tensor in self._momentum.items()}
        }
        if self._optimizer is not None:
            state["optimizer"] = copied(self._optimizer.state_dict())
        return state

    def load(self, state: Mapping[str, Any]) -> None:
        """Take up what `state` gave.

        Raises:
            ValueError: it is another outer step's.
        """
        momentum, has_optimizer = state.get("momentum", {}), "optimizer" in state
        if set(momentum) != set(self._momentum) or has_optimizer != (self._optimizer is not None):
            raise ValueError(
                f"the saved state is of another outer step than {self._method.outer!r}"
            )
        for name, tensor in momentum.items():
            self._momentum[name].copy_(tensor)
        if self._optimizer is not None:
            self._optimizer.load_state_dict(copied(state["optimizer"]))


def copied(state: Any) -> Any:
    """A state of dicts, lists and tensors, its tensors copied."""
    if isinstance(state, Tensor):
        return state.detach().clone()
    if isinstance(state, Mapping):
        return {key: copied(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(copied(value) for value in state)
    return state
