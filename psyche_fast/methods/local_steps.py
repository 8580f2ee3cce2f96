"""`LocalSteps`: SparseLoCo, DiLoCo and MuLoCo around any `torch.optim.Optimizer`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from psyche_fast.methods.method import Method
from psyche_fast.methods.presets import get
from psyche_fast.methods.replica import Replica
from psyche_fast.methods.rounds import Rounds


class LocalSteps(torch.optim.Optimizer):
    """Local steps of an optimiser, and every so many of them a round with the other replicas.

    Each rank of `process_group` is a replica with its own data::

        inner = torch.optim.AdamW(model.named_parameters(), lr=4e-4)
        optimizer = LocalSteps(inner, "sparseloco", every=30, k=64)
        ...
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    With sharded parameters (FSDP2, tensor parallelism) a replica is several ranks, and
    `process_group` is this rank's counterparts in the others: for a mesh of
    `("replicate", "shard")`, whose `mesh["shard"]` FSDP2 has, `mesh.get_group("replicate")`.

    Gradients must not be averaged between replicas by other means (no DDP over this group). All
    ranks call `step` equally often. Learning rates, parameter groups and schedulers are the inner
    optimiser's; schedules go by inner steps. `shared` are the parameters to evaluate and to export.

    A `torch.amp.GradScaler` may step it: a step that overflows on one rank is left out there, and
    counts.

    Args:
        optimizer: takes the local steps, in place of the method's own; of float32 or float64
            parameters, named or not, in the same order and equal on all ranks. With names of layers
            (`model.named_parameters()`) fragments are layers.
        method: a name that `psyche_fast.methods.get` knows, or a `Method`, with
            `what="pseudo_gradient"`.
        process_group: the replicas; the default group where None, which sharded parameters do not
            take. Without torch.distributed there is one replica.
        backend: "auto", "triton", "torch" or "interpret".
        **overrides: fields of the method.

    Attributes:
        inner: `optimizer`.
        method: the method.
        bytes_sent: bytes of this rank's messages so far.

    Raises:
        ValueError: a method without local steps, or that cannot take these parameters; replicas
            that differ at the start; or a group with other ranks of this replica.
        TypeError: a field that no method has.
    """

    _step_supports_amp_scaling = True  # the scaler then leaves it to `step` what to leave out

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        method: str | Method = "sparseloco",
        *,
        process_group: dist.ProcessGroup | None = None,
        backend: str = "auto",
        **overrides: Any,
    ) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer: wanted a torch.optim.Optimizer, got {optimizer!r}")
        if isinstance(method, str):
            method = get(method, **overrides)
        elif overrides:
            method = replace(method, **overrides)
        if not method.is_local:
            raise ValueError(f"LocalSteps wants local steps, which what={method.what!r} has not")
        self.inner, self.method = optimizer, method
        self._complete = False
        super().__init__([{"params": g["params"]} for g in optimizer.param_groups], {})
        self._share()
        self._complete = True
        group = process_group
        named = _named(optimizer)
        if group is None and dist.is_available() and dist.is_initialized():
            group = dist.group.WORLD
        _check_group(named, group)
        alone = group is None or dist.get_world_size(group) == 1
        self.replica = Replica(
            method,
            named,
            replica=0 if group is None else dist.get_rank(group),
            replicas=1 if group is None else dist.get_world_size(group),
            inner=optimizer,
            backend=backend,
        )
        self._rounds = Rounds(self.replica, None if alone else group)

    @property
    def bytes_sent(self) -> int:
        """See the class."""
        return self._rounds.bytes_sent

    @property
    def shared(self) -> dict[str, Tensor]:
        """The parameters that all replicas share, by name, as of the last round; not copies."""
        return dict(self.replica.plain())

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """A local step; where it ends a round, a collective of all replicas.

        Args:
            closure: computes the loss and the gradients anew, before the step.

        Returns:
            What the inner optimiser's step returned.
        """
        loss = None
        overflowed = getattr(self, "found_inf", None)  # GradScaler's, with the next
        scale = getattr(self, "grad_scale", None)
        if overflowed is None or not overflowed.item():
            if scale is not None:
                gradients = [
                    p.grad for g in self.param_groups for p in g["params"] if p.grad is not None
                ]
                torch._foreach_div_(gradients, scale)
            loss = self.inner.step(closure) if closure is not None else self.inner.step()
        self.replica.stepped()
        self._rounds.exchange()
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Not possible: all replicas would have to know.

        Raises:
            ValueError: always, once it has been made.
        """
        if self._complete:
            raise ValueError("parameters cannot be added to LocalSteps; make a new one")
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The inner optimiser's, and under "local_steps" all else that this rank needs to go on.

        The parameters, the shared ones and messages in flight are in it: each rank has its own.
        """
        return {**self.inner.state_dict(), "local_steps": self.replica.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what `state_dict` gave on this rank; a collective of all replicas.

        Raises:
            ValueError: it is of another method, number of replicas or model, or other replicas have
                taken up those of another step.
        """
        if "local_steps" not in state_dict:
            raise ValueError(f"a state of LocalSteps has local_steps, got {sorted(state_dict)}")
        state = dict(state_dict)
        local = state.pop("local_steps")
        self.inner.load_state_dict(state)
        self._share()
        self.replica.load_state_dict(local)
        self._rounds.resume()

    def _share(self) -> None:
        """Groups, state and defaults are the inner optimiser's."""
        self.param_groups, self.state = self.inner.param_groups, self.inner.state
        self.defaults = self.inner.defaults


def _named(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Parameters that are trained, by name or number."""
    named: dict[str, Tensor] = {}
    for group in optimizer.param_groups:
        names = group.get("param_names")
        for i, p in enumerate(group["params"]):
            name = names[i] if names else f"number {len(named):06d}"
            if p.requires_grad:
                named[name] = p
    return named


def _check_group(named: dict[str, Tensor], group: dist.ProcessGroup | None) -> None:
    """Checks that no parameter is sharded over ranks that are replicas of each other.

    Raises:
        ValueError: one is.
    """
    replicas = set() if group is None else set(dist.get_process_group_ranks(group))
    for name, p in named.items():
        if not isinstance(p, DTensor):
            continue
        both = sorted(replicas & set(p.device_mesh.mesh.flatten().tolist()))
        if len(both) > 1:
            raise ValueError(
                f"process_group: parameter {name} is spread over ranks {both}, which are of one "
                "replica; wanted the group of this rank's counterparts in the other replicas"
            )
