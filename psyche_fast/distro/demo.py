"""`DeMo`: decoupled momentum as a `torch.optim.Optimizer` (DeMo, arXiv 2411.19870)."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from psyche_fast.distro import exchange
from psyche_fast.distro.chunks import (
    Layout,
    ParameterLayout,
    check_compression,
    check_delta_shape,
    warn_of_tiny_chunks,
)
from psyche_fast.distro.message import MessageFormat
from psyche_fast.distro.shards import GradientGuard, check_dense
from psyche_fast.distro.verdict import agree
from psyche_fast.kernels.apply import apply, subtract
from psyche_fast.kernels.backends import checked_backend
from psyche_fast.kernels.encode import encode
from psyche_fast.kernels.plan import ChunkPlan, Entries, Rates, single

logger = logging.getLogger(__name__)

_HYPERPARAMETERS = ("compression_decay", "compression_topk", "compression_chunk", "process_group")


class DeMo(torch.optim.Optimizer):
    """Sign descent on the momentum's largest DCT coefficients, which are all that peers exchange.

    Each `step()`, for every parameter::

        theta *= 1 - lr * weight_decay
        delta  = compression_decay * delta + lr * grad
        own    = top-k of the chunked DCT of delta      # ties to the lowest index
        delta -= decode(own)                            # left to the next step, or `flush`
        theta -= lr * sign(decode(mean over the peers of own))

    The peers are the ranks of `process_group`; one all-gather per step carries everything.
    Gradients must not be averaged between them by other means (run DDP under `no_sync`), and
    `.grad` is left as it is. A parameter without gradient takes part with a gradient of zero, so
    that all ranks stay in step. Gradients of which an element is NaN or infinite are left out, all
    of the step's: delta would never be rid of it. Parameters that are frozen are left alone, and
    those that are unfrozen later join in, with what delta they had; all peers have to do it alike.

    `state[p]["delta"]` is float32 (float64 for float64 parameters), in the encoded shape `[...,
    R/h, C/w, h, w]` (`[N/w, w]` for a vector). The next step takes out of it what the last one has
    sent, in the same pass as everything else: read it after `flush`. `state_dict`, copies and
    pickles have it done; they round-trip, and change nothing of the run, to the bit.

    A learning rate may be a 0-d float32 tensor on the parameters' device, which is not waited for.
    There is neither `momentum` nor `betas` to schedule: OneCycleLR and CyclicLR want
    `cycle_momentum=False`.

    All steps belong on one CUDA stream: the kernels share the optimiser's scratch memory, which two
    streams would write at once. Steps may move to another stream once the former one has done its
    work (`torch.cuda.synchronize()`); before, they are refused with a RuntimeError.

    Args:
        params: tensors, parameter groups (each may have its own `lr`, `weight_decay`,
            `compression_topk` and `compression_chunk`) or (name, tensor) pairs.
        lr: learning rate.
        compression_decay: decay of delta per step, `0 <= beta < 1`.
        compression_topk: coefficients sent per chunk.
        compression_chunk: side of a chunk; a dimension is cut by its largest divisor that is not
            larger.
        weight_decay: decoupled weight decay.
        process_group: the peers; the default group where None. Without torch.distributed there is
            one peer.
        backend: "auto", "triton", "torch" or "interpret".

    Attributes:
        data_transmit: bytes of the message with this rank's results in the last step.
        data_receive: bytes of results that it received, its own included.
        refused: 0-d int64 on the parameters' device, in how many steps this rank's gradients were
            left out because they, or `grad_scale`, were not finite.

    Raises:
        ValueError: an argument out of range, a setting that a group cannot have, a backend that
            cannot run, or a sharded parameter (`Distro` takes those).
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]],
        lr: float | Tensor,
        compression_decay: float = 0.999,
        compression_topk: int = 32,
        compression_chunk: int = 64,
        weight_decay: float = 0.0,
        process_group: dist.ProcessGroup | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        check_compression(compression_decay, compression_topk, compression_chunk, weight_decay)
        self.backend = backend
        self.compression_decay = compression_decay
        self.compression_topk = compression_topk
        self.compression_chunk = compression_chunk
        self.process_group = process_group
        self.data_transmit = 0
        self.data_receive = 0
        self._number = 0  # of the last exchange: what is sent twice is refused
        self._plan: _Plan | None = None
        super().__init__(
            params,
            {
                "lr": lr,
                "weight_decay": weight_decay,
                "compression_topk": compression_topk,
                "compression_chunk": compression_chunk,
            },
        )
        self._guard = self._new_guard()
        self._plan = _Plan(self)
        warn_of_tiny_chunks(self._plan.layout.parameters, compression_chunk)

    @property
    def refused(self) -> Tensor:
        """See the class."""
        return self._guard.refused

    def _new_guard(self) -> GradientGuard:
        return GradientGuard([p for group in self.param_groups for p in group["params"]], "DeMo")

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], Any] | None = None,
        *,
        grad_scale: float | Tensor | None = None,
    ) -> Any:
        """Take one step; a collective over the peers.

        Args:
            closure: computes the loss and the gradients anew, before the step.
            grad_scale: factor on the gradients (clipping), a number or a 0-d float32 tensor on the
                parameters' device, which is not waited for. Where it is not finite all gradients
                are left out, as if there were none.

        Returns:
            What the closure returned, None without one.

        Raises:
            TypeError: a gradient is sparse; the parameter is named.
            ValueError: a group's learning rate or weight decay is no number, or negative.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            _check_rates(group)
        if self._plan is None or self._plan.settings != _settings(self):
            self.flush()
            self._plan = _Plan(self)
        for name, p in self._plan.named:
            check_dense(name, p.grad)
        factor = self._guard.scale([p.grad for _, p in self._plan.named], grad_scale)
        for c in self._plan.classes:
            c.own = encode(
                c.plan,
                c.delta,
                [p.grad for p in c.parameters],
                c.per_member(self.param_groups, _learning_rate),
                decay=self.compression_decay,
                gradient_scale=factor.to(c.plan.device, non_blocking=True),
                previous=c.own,
                backend=c.backend,
            )
        received = self._gather()
        if received is None:
            return loss
        decayed = any(group["weight_decay"] != 0.0 for group in self.param_groups)
        for c, entries in zip(self._plan.classes, received, strict=True):
            apply(
                c.plan,
                c.parameters,
                entries,
                c.per_member(self.param_groups, _learning_rate),
                shrinks=c.per_member(self.param_groups, _shrink) if decayed else None,
                backend=c.backend,
            )
        return loss

    @torch.no_grad()
    def flush(self) -> None:
        """Bring `state[p]["delta"]` up to date: take out of it what the last step has sent.

        Later steps are the same with it or without, to the bit.
        """
        for c in self._plan.classes if self._plan is not None else ():
            if c.own is not None:
                subtract(c.plan, c.delta, c.own, backend=c.backend)
                c.own = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; their delta starts at zero.

        Raises:
            ValueError: a setting out of range, or one that only the optimiser as a whole has.
        """
        for name in ("compression_decay", "process_group", "backend"):
            if name in param_group:
                raise ValueError(f"{name} is the optimiser's; a group cannot have its own")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_rates(group)
            check_compression(
                self.compression_decay, group["compression_topk"], group["compression_chunk"],
                group["weight_decay"],
            )  # fmt: skip
        except ValueError:
            del self.param_groups[-1]
            raise
        self.flush()
        self._plan = None

    def state_dict(self) -> dict[str, Any]:
        """The state of every parameter and the groups' settings, `flush`ed before."""
        self.flush()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what `state_dict` returned.

        Raises:
            ValueError: a delta is missing or cut otherwise, naming the parameter; nothing has been
                changed then.
        """
        saved = self._saved_deltas(state_dict)
        super().load_state_dict(state_dict)
        for group in self.param_groups:  # which states of before these were a group's do not have
            group.setdefault("compression_topk", self.compression_topk)
            group.setdefault("compression_chunk", self.compression_chunk)
        # torch has converted the state to each parameter's dtype, which would round delta: put the
        # saved one in.
        for p, delta in saved.items():
            self.state[p]["delta"] = delta.detach().to(p.device, copy=True)
        self._plan = _Plan(self)

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the plan and the process group, which cannot be copied."""
        self.flush()
        kept = {name: getattr(self, name) for name in _HYPERPARAMETERS[:-1]}
        traffic = {n: getattr(self, n) for n in ("data_transmit", "data_receive", "_number")}
        return {**super().__getstate__(), **kept, **traffic, "backend": self.backend}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy; it exchanges with the default process group."""
        super().__setstate__(state)
        self.__dict__.setdefault("process_group", None)
        self.__dict__.setdefault("_number", 0)
        self._guard = self._new_guard()
        self._plan = None

    def _gather(self) -> list[Entries] | None:
        """The peers' entries side by side, in rank order, one `Entries` per chunk class.

        What a peer has sent that cannot be right, or has not arrived whole at all peers, is left
        out by all, with a warning that names the sender; None where nothing remains.
        """
        assert self._plan is not None
        if self._plan.format is None:
            return None
        own = [c.own for c in self._plan.classes if c.own is not None]
        alone = not (dist.is_available() and dist.is_initialized())
        peers = 1 if alone else dist.get_world_size(self.process_group)
        form = self._plan.format
        self.data_transmit = form.size
        self.data_receive = peers * form.size
        if peers == 1:
            return own
        group = self.process_group or dist.group.WORLD
        assert group is not None
        self._number += 1
        pending = exchange.start(form.pack(own, self._number, dist.get_rank(group)), group)
        messages = pending.host()
        found = form.faults(messages, self._number, range(peers))
        refused, _ = agree(found | form.decode(messages, found)[1], messages, group)
        entries, faults = form.begin_unpack(pending.wait(), leave_out=refused).result()
        for peer, what in sorted((refused | faults).items()):
            logger.warning("DeMo: the result of peer %d is refused: %s", peer, what)
        return entries

    def _saved_deltas(self, state_dict: dict[str, Any]) -> dict[Tensor, Tensor]:
        """The saved delta of every parameter, checked."""
        saved: dict[Tensor, Tensor] = {}
        if len(state_dict["param_groups"]) != len(self.param_groups):
            return saved  # torch has the message for this
        for group, saved_group in zip(self.param_groups, state_dict["param_groups"], strict=True):
            if len(group["params"]) != len(saved_group["params"]):
                return saved
            for i, (p, key) in enumerate(zip(group["params"], saved_group["params"], strict=True)):
                entry = state_dict["state"].get(key)
                if entry is None:
                    continue  # frozen when it was saved: it starts at zero
                layout = _layout_of(self, p, _name(group, i, key), group)
                if "delta" not in entry:
                    raise ValueError(
                        f"delta of parameter {layout.name} is missing from the saved state"
                    )
                check_delta_shape(layout, entry["delta"])
                saved[p] = entry["delta"]
        return saved


@dataclass(slots=True)
class _Class:
    """One chunk class with its parameters and state.

    Attributes:
        plan: the chunk class.
        backend: what its operations run on.
        parameters: the members.
        groups: for each the number of its parameter group.
        delta: state `[chunks, h, w]`, of which `own` has yet to be subtracted.
        own: entries of the last step; None where there are none or they have been subtracted.
    """

    plan: ChunkPlan
    backend: str
    parameters: list[Tensor]
    groups: list[int]
    delta: Tensor
    own: Entries | None = None

    def per_member(
        self,
        groups: list[dict[str, Any]],
        value: Callable[[dict[str, Any], float | Tensor], float | Tensor],
    ) -> Rates:
        """A value of every member's parameter group: numbers, or a tensor if any of them is."""
        rates = [group["lr"] for group in groups]
        if self.plan.compute_dtype == torch.float32:
            rates = [single(rate) for rate in rates]
        values = [value(group, rate) for group, rate in zip(groups, rates, strict=True)]
        if not any(isinstance(v, Tensor) for v in values):
            return [float(values[group]) for group in self.groups]
        tensors = [
            v.to(self.plan.device, torch.float32)
            if isinstance(v, Tensor)
            else torch.full((), v, dtype=torch.float32, device=self.plan.device)
            for v in values
        ]
        if len(tensors) == 1:
            return tensors[0].view(())
        return torch.stack([tensors[group].view(()) for group in self.groups])


class _Plan:
    """What `step` needs, worked out once; makes each `state[p]["delta"]` a view of its buffers.

    Attributes:
        settings: what it was worked out from.
        layout: how the parameters that are trained are cut.
        named: these with their names.
        classes: the chunk classes that they form.
        format: of the message; None where nothing is trained.
    """

    def __init__(self, optimizer: DeMo) -> None:
        self.settings = _settings(optimizer)
        layouts = []
        parameters: list[Tensor] = []
        groups: list[int] = []
        for number, group in enumerate(optimizer.param_groups):
            for i, p in enumerate(group["params"]):
                if p.requires_grad:
                    name = _name(group, i, len(parameters))
                    layouts.append(_layout_of(optimizer, p, name, group))
                    parameters.append(p)
                    groups.append(number)
        self.layout = Layout(layouts)
        self.named = [(p.name, q) for p, q in zip(layouts, parameters, strict=True)]
        deltas = self.layout.zeros()
        views = self.layout.views(deltas)
        for p, layout, delta in zip(parameters, layouts, views, strict=True):
            if "delta" in optimizer.state[p]:
                check_delta_shape(layout, optimizer.state[p]["delta"])
                delta.copy_(optimizer.state[p]["delta"])
            optimizer.state[p]["delta"] = delta
        backends = [checked_backend(plan, optimizer.backend) for plan in self.layout.plans]
        self.format = MessageFormat(self.layout, backends, signs=False) if layouts else None
        self.classes = [
            _Class(
                plan,
                backend,
                [parameters[m.position] for m in plan.members],
                [groups[m.position] for m in plan.members],
                delta,
            )
            for plan, backend, delta in zip(self.layout.plans, backends, deltas, strict=True)
        ]


def _learning_rate(group: dict[str, Any], rate: float | Tensor) -> float | Tensor:
    return rate


def _shrink(group: dict[str, Any], rate: float | Tensor) -> float | Tensor:
    return 1.0 - rate * group["weight_decay"]  # type: ignore[no-any-return]


def _name(group: dict[str, Any], i: int, position: int) -> str:
    names = group.get("param_names")
    return str(names[i]) if names else f"number {position}"


def _settings(optimizer: DeMo) -> list[object]:
    """What decides which parameters are trained, and how they are cut."""
    return [
        ([p.requires_grad for p in group["params"]], *_cut(optimizer, group))
        for group in optimizer.param_groups
    ]


def _cut(optimizer: DeMo, group: dict[str, Any]) -> tuple[int, int]:
    return (
        group.get("compression_chunk", optimizer.compression_chunk),
        group.get("compression_topk", optimizer.compression_topk),
    )


def _check_rates(group: dict[str, Any]) -> None:
    for name in ("lr", "weight_decay"):
        value = group[name]
        known = not isinstance(value, Tensor) or value.device.type == "cpu"
        if known and not 0 <= float(value) < math.inf:
            raise ValueError(f"{name} must be a number and not negative, got {value}")


def _layout_of(
    optimizer: DeMo, parameter: Tensor, name: str, group: dict[str, Any]
) -> ParameterLayout:
    if isinstance(parameter, DTensor):
        raise ValueError(
            f"parameter {name} is sharded (a DTensor), which DeMo does not take; use Distro"
        )
    chunk, topk = _cut(optimizer, group)
    return ParameterLayout.of(
        name,
        parameter.shape,
        parameter.dtype,
        parameter.device,
        compression_chunk=chunk,
        compression_topk=topk,
    )
