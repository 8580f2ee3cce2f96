"""What `DeMo` and `DisTrO` share: full citizens of `torch.optim` whose ranks are peers.

A plan (`plans.Plan`) is worked out once, and anew where parameters, their groups or the peers are
no longer those that it was worked out from. While there is one, `state` holds views of its buffers;
else, as in `state_dict` and in copies, what is whole or a DTensor.
"""

from __future__ import annotations

import copy
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from psyche_fast.compat import all_gather_single
from psyche_fast.devices import message_for
from psyche_fast.distro.chunks import warn_of_tiny_chunks
from psyche_fast.distro.groups import (
    ADAMW,
    check_gradient,
    check_options,
    check_rates,
    complete_group,
    highest,
    parameter_name,
    refuse_flags,
)
from psyche_fast.distro.guard import GradientGuard, check_dense
from psyche_fast.distro.message import hash_bits
from psyche_fast.distro.plans import ParameterState, Plan, peers_now, settings_of
from psyche_fast.sharding import local_tensor

logger = logging.getLogger(__name__)

Params = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]


class PeerOptimizer(torch.optim.Optimizer):
    """Base of the optimisers whose peers exchange compressed momenta. Not to be made itself.

    Args:
        params: tensors, parameter groups or (name, tensor) pairs.
        defaults: options of groups that have none of their own.
        settings: attributes that the optimiser as a whole has.
        flags: of other optimisers, to be refused where they cannot be had.
    """

    method = ""
    """What a parameter group's `method` is unless it is `"adamw"`."""
    signs = False
    """Whether messages have the values' signs only."""
    _step_supports_amp_scaling = True  # GradScaler: `step` is called whatever was found

    def __init__(
        self,
        params: Params,
        defaults: dict[str, Any],
        settings: dict[str, Any],
        flags: dict[str, Any],
    ) -> None:
        refuse_flags(flags, type(self).__name__)
        for name, value in settings.items():
            setattr(self, name, value)
        self._settings = tuple(settings)
        self.data_transmit = 0
        self.data_receive = 0
        self._plan: Plan | None = None
        super().__init__(params, {**defaults, "method": self.method})
        self._guard = self._new_guard()
        self._compared = False
        plan = self._current()
        warn_of_tiny_chunks(plan.wholes, self.compression_chunk)

    compression_decay: float
    compression_topk: int
    compression_chunk: int
    process_group: dist.ProcessGroup | None
    backend: str

    @property
    def refused(self) -> Tensor:
        """See the class."""
        return self._guard.refused

    def _new_guard(self) -> GradientGuard:
        every = [p for group in self.param_groups for p in group["params"]]
        return GradientGuard(every, type(self).__name__)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], Any] | None = None,
        *,
        grad_scale: float | Tensor | None = None,
    ) -> Any:
        """Take one step; a collective over the peers, and over the ranks of a sharded replica.

        Under a `GradScaler` the gradients are unscaled here, if they have not been; where any rank
        has found some that are not finite, the step is left out on all of them.

        Args:
            closure: computes the loss and the gradients anew, before the step.
            grad_scale: factor on the gradients (clipping), a number or a 0-d float32 tensor on the
                parameters' device, which is not waited for. Where it is not finite all gradients
                are left out, as if there were none.

        Returns:
            What the closure returned, None without one.

        Raises:
            TypeError: a gradient is sparse or complex; the parameter is named.
            ValueError: a group's learning rate or weight decay is no number, or negative.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            check_rates(group)
        plan = self._current()
        for name, p in plan.named:
            check_dense(name, p.grad)
            check_gradient(name, p.grad)
        found = getattr(self, "found_inf", None)
        if found is not None:
            everywhere = highest(found.view(1), [*self._guard.groups, *plan.peer_groups])
            if everywhere.item():
                return loss
        scaled = getattr(self, "grad_scale", None)  # a GradScaler's
        if scaled is not None:
            grad_scale = (1.0 if grad_scale is None else grad_scale) / scaled
        gradients = [p.grad for _, p in plan.named]
        self._compare(plan, gradients)
        factor = self._guard.scale(gradients, grad_scale)
        self.data_transmit = self.data_receive = 0
        if plan.format is not None:
            self._update(plan, factor)
        plan.adamw.step(self.param_groups, factor)
        self.data_transmit += plan.adamw.bytes_sent
        self.data_receive += plan.adamw.bytes_sent
        return loss

    def _update(self, plan: Plan, factor: Tensor) -> None:
        """A step of the parameters that are compressed."""
        raise NotImplementedError

    def flush(self) -> None:
        """Finish what a step has left to the next one."""
        raise NotImplementedError

    def _publish(self, plan: Plan) -> None:
        """Bring `state` up to date; no collective."""

    def add_state(self, plan: Plan) -> None:
        """Put into `state` what there is beside delta: views of buffers that stay."""

    def _resume(self, plan: Plan) -> None:
        """Go on from what has been restored."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; their state starts at zero.

        Args:
            param_group: `params` and options. With `method="adamw"` they are trained by AdamW, on
                the mean of the peers' gradients, and `betas` and `eps` are options too.

        Raises:
            ValueError: a setting out of range, or one that only the optimiser as a whole has.
        """
        check_options(param_group)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            complete_group(group, self.method, self.compression_decay, type(self).__name__)
            for i, p in enumerate(group["params"]):
                if p.is_complex():
                    name = parameter_name(group, i, i)
                    raise ValueError(
                        f"parameter {name} must be floating point and real, got {p.dtype}"
                    )
        except ValueError:
            del self.param_groups[-1]
            raise

    def state_dict(self) -> dict[str, Any]:
        """The state of every parameter and the groups' settings; changes nothing, to the bit.

        What only this replica has is named `.../replica-N`, by the rank in the group of peers, so
        that nothing which gathers states merges replicas; the rest is the same on all of them. Of
        a sharded parameter it is a DTensor, or the whole where chunks have been divided among
        ranks, which makes this a collective of the replica.
        """
        self._current()
        local, self.state = self.state, self._portable()
        try:
            return super().state_dict()
        finally:
            self.state = local

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what `state_dict` returned, on any number of ranks of a replica.

        Of another number of replicas each takes up its own; one that was not there is refused
        (whoever wants it to begin at zero copies what its own `state_dict` has of it).

        Raises:
            ValueError: a state is missing or cut otherwise, naming the parameter; nothing has been
                changed then.
        """
        loaded: dict[Tensor, dict[str, Tensor]] = {}

        def take(_: Any, given: dict[str, Any]) -> dict[str, Any]:
            loaded.update(self._checked(given))
            return {**given, "state": {}}  # torch would round it to the parameters' type

        def put(_: Any) -> None:
            for group in self.param_groups:  # states of before these were a group's lack them
                group.setdefault("method", self.method)
                if group["method"] != ADAMW:
                    group.setdefault("compression_topk", self.compression_topk)
                    group.setdefault("compression_chunk", self.compression_chunk)
            self.state = defaultdict(dict, loaded)
            self._current()

        # after the hooks of others that change what is loaded, before those that look at it
        handles = (
            self.register_load_state_dict_pre_hook(take),
            self.register_load_state_dict_post_hook(put, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the plan and the process group, which cannot be copied."""
        kept = {n: getattr(self, n) for n in self._settings if n != "process_group"}
        traffic = {"data_transmit": self.data_transmit, "data_receive": self.data_receive}
        whole = {"state": self._portable(), "_settings": self._settings}
        return {**super().__getstate__(), **kept, **traffic, **whole}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy; one from a file exchanges with the default process group."""
        super().__setstate__(state)
        self.__dict__.setdefault("process_group", None)
        self._guard = self._new_guard()
        self.__dict__.setdefault("_compared", False)
        self._plan = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy with the same peers."""
        other = type(self).__new__(type(self))
        memo[id(self)] = other
        other.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        other.process_group = self.process_group
        return other

    def _current(self) -> Plan:
        """The plan, worked out anew where it no longer fits."""
        peers = self._plan.peer_key if self._plan is not None else None
        if (
            self._plan is None
            or self._plan.settings != settings_of(self)
            or peers != peers_now(self)
        ):
            if self._plan is not None:
                self.flush()
                portable = self._portable()
                self.state = defaultdict(dict, {p: ParameterState(s) for p, s in portable.items()})
            plan = Plan(self)
            every = {p for group in self.param_groups for p in group["params"]}
            for p in [p for p in self.state if p not in every]:  # exchanged for others
                del self.state[p]
            restored = plan.restore(self)
            self._plan = plan
            if restored:
                self._resume(plan)
        return self._plan

    def _portable(self) -> defaultdict[Tensor, Any]:
        """The state of each parameter with names and tensors that mean the same everywhere."""
        state = {p: dict(own) for p, own in self.state.items()}
        if self._plan is not None:
            self._publish(self._plan)
            state |= self._plan.portable()
        return defaultdict(dict, state)

    def _checked(self, state_dict: dict[str, Any]) -> dict[Tensor, dict[str, Tensor]]:
        """The saved state of every parameter that is trained."""
        saved: dict[Tensor, dict[str, Tensor]] = {}
        if len(state_dict["param_groups"]) != len(self.param_groups):
            return saved  # torch has the message for this
        plan = self._current()
        for group, saved_group in zip(self.param_groups, state_dict["param_groups"], strict=True):
            if len(group["params"]) != len(saved_group["params"]):
                return saved
            for p, key in zip(group["params"], saved_group["params"], strict=True):
                entry = state_dict["state"].get(key)
                if not entry:
                    continue  # it was frozen when it was saved: it starts at zero
                saved[p] = dict(entry)
                if not p.requires_grad:  # kept until it is trained again
                    saved[p] = {n: t.detach().to(p.device, copy=True) for n, t in entry.items()}
                elif saved_group.get("method", self.method) == group["method"]:
                    plan.check(p, saved[p])
        return saved

    def _compare(self, plan: Plan, gradients: list[Tensor | None]) -> None:
        """Say once where the peers' gradients are the same bits, as DDP's reduction makes them."""
        if self._compared or not plan.peer_groups:
            return
        self._compared = True
        (peers,) = plan.peer_groups
        given = [local_tensor(g) for g in gradients if g is not None]
        device = self._guard.refused.device
        hashes = [hash_bits(g).to(device) for g in given]
        some = any(bool(g.count_nonzero()) for g in given)
        total = torch.stack(hashes).sum() if hashes else torch.zeros_like(self._guard.refused)
        own = message_for(peers, torch.stack([total, torch.full_like(total, int(some))]))
        every = own.new_empty(plan.replicas * 2)
        all_gather_single()(every, own, group=peers)
        every = every.view(-1, 2)
        if bool((every == own).all()) and some:
            logger.warning(
                "%s: all peers have the same gradients, bit for bit, as they have where something "
                "averages them: then each step sends what is known already. Run DistributedDataPa"
                "rallel under `no_sync()`, or with `register_comm_hook(None, noop_hook)` "
                "(torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks)",
                type(self).__name__,
            )
