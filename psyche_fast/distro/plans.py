"""What a step of `DeMo` and `DisTrO` needs, worked out once, and their state wherever it lies."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from psyche_fast.distro.chunks import Layout, ParameterLayout, check_delta_shape
from psyche_fast.distro.dense import DenseAdamW, Moments
from psyche_fast.distro.groups import ADAMW, parameter_name, peers_of
from psyche_fast.distro.message import MessageFormat
from psyche_fast.distro.shards import Parts
from psyche_fast.kernels.backends import checked_backend
from psyche_fast.kernels.plan import ChunkPlan, Entries, Rates, chunk_view, single
from psyche_fast.sharding import placed_like

_OF_A_REPLICA = "/replica-"
_UNSIGNED = (torch.uint16, torch.uint32)


class ParameterState(dict[str, Tensor]):
    """A parameter's state by name; `state["delta"]` finds `delta/replica-N`."""

    def __missing__(self, key: str) -> Tensor:
        for name, tensor in self.items():
            if name.startswith(key + _OF_A_REPLICA):
                return tensor
        raise KeyError(key)


class Planned(Protocol):
    """What a plan wants to know of its optimiser."""

    param_groups: list[dict[str, Any]]
    state: defaultdict[Tensor, Any]
    process_group: dist.ProcessGroup | None
    backend: str
    signs: bool

    def add_state(self, plan: Plan) -> None:
        """Add to the plan's `states` what there is beside delta: views of buffers that stay."""


@dataclass(slots=True)
class ChunkClass:
    """One chunk class with its parameters and state.

    Attributes:
        plan: the chunk class.
        backend: what its operations run on.
        positions: the members' numbers among the parameters that are compressed.
        groups: for each member the number of its parameter group.
        delta: state `[chunks, h, w]`, of which `own` has yet to be subtracted.
        own: entries of the last step; None where there are none or they have been subtracted.
    """

    plan: ChunkPlan
    backend: str
    positions: list[int]
    groups: list[int]
    delta: Tensor
    own: Entries | None = None

    def of(self, tensors: list[Any]) -> list[Any]:
        """The members' of a list with one for every parameter that is compressed."""
        return [tensors[i] for i in self.positions]

    def rates(
        self,
        groups: list[dict[str, Any]],
        value: Callable[[dict[str, Any], float | Tensor], float | Tensor],
        key: str = "lr",
    ) -> Rates:
        """A value of every member's parameter group: numbers, or a tensor if any of them is."""
        rates = [group[key] if g in self.groups else 0.0 for g, group in enumerate(groups)]
        if self.plan.compute_dtype == torch.float32:
            rates = [single(rate) for rate in rates]
        values = [
            value(group, rate) if g in self.groups else 0.0
            for g, (group, rate) in enumerate(zip(groups, rates, strict=True))
        ]
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


class Plan:
    """What `step` needs, worked out once; a collective where chunks of shards are divided.

    Attributes:
        settings: what it was worked out from.
        peer_key: and from which peers.
        named: all parameters that are trained with their names.
        compressed: those that are compressed; `parts`, `wholes` and `layout` are of these.
        parts: this rank's part of each.
        wholes: how the whole ones are cut.
        layout: how this rank's parts are cut.
        classes: the chunk classes that these form.
        format: of the message; None where nothing is compressed.
        adamw: trains the others.
        peers: the ranks to exchange with; None for nobody.
        peer_groups: the same as a list.
        suffix: of names of what this replica alone has.
    """

    def __init__(self, optimizer: Planned) -> None:
        self.settings, self.peer_key = settings_of(optimizer), peers_now(optimizer)
        self.named: list[tuple[str, Tensor]] = []
        self.compressed: list[Tensor] = []
        self.wholes: list[ParameterLayout] = []
        groups: list[int] = []
        dense: list[Moments] = []
        for number, group in enumerate(optimizer.param_groups):
            for i, p in enumerate(group["params"]):
                if not p.requires_grad:
                    continue
                name = parameter_name(group, i, len(self.named))
                self.named.append((name, p))
                if group["method"] == ADAMW:
                    dense.append(Moments.of(name, p, number))
                    continue
                self.wholes.append(
                    ParameterLayout.of(
                        name,
                        p.shape,
                        p.dtype,
                        p.device,
                        compression_chunk=group["compression_chunk"],
                        compression_topk=group["compression_topk"],
                    )
                )
                self.compressed.append(p)
                groups.append(number)
        what = type(optimizer).__name__
        everyone = [p for _, p in self.named]
        self.peers = peers_of(everyone, optimizer.process_group, what)
        self.peer_groups = [] if self.peers is None else [self.peers]
        if self.peers is not None and dist.get_world_size(self.peers) == 1:
            self.peers, self.peer_groups = None, []
        self.replica = 0 if self.peers is None else dist.get_rank(self.peers)
        self.replicas = 1 if self.peers is None else dist.get_world_size(self.peers)
        self.suffix = f"{_OF_A_REPLICA}{self.replica}"
        self.adamw = DenseAdamW(dense, self.peers)
        self.parts = Parts(self.compressed, self.wholes)
        self.layout = Layout(self.parts.layouts)
        backends = [checked_backend(plan, optimizer.backend) for plan in self.layout.plans]
        deltas = self.layout.zeros()
        self.deltas = self.layout.views(deltas)
        self.states: list[ParameterState] = []
        self.format = (
            MessageFormat(self.layout, backends, signs=optimizer.signs) if self.wholes else None
        )
        self.classes = [
            ChunkClass(
                plan,
                backend,
                [m.position for m in plan.members],
                [groups[m.position] for m in plan.members],
                delta,
            )
            for plan, backend, delta in zip(self.layout.plans, backends, deltas, strict=True)
        ]

    def restore(self, optimizer: Planned) -> bool:
        """Take up portable state; afterwards `state` has views of what is here.

        Returns:
            whether there was any.
        """
        found = {p: s for p, s in optimizer.state.items() if s}
        self.states = []
        for p, delta in zip(self.compressed, self.deltas, strict=True):
            self.states.append(ParameterState({"delta" + self.suffix: delta}))
            optimizer.state[p] = self.states[-1]
        optimizer.add_state(self)
        for moments in self.adamw.members:
            optimizer.state[moments.parameter] = ParameterState(moments.state)
        for position, p in enumerate(self.compressed):
            self._fill(self.states[position], found.get(p, {}), position)
        for moments in self.adamw.members:
            for name, tensor in found.get(moments.parameter, {}).items():
                if name in moments.state:
                    of_elements = name != "step"
                    moments.state[name].copy_(
                        _local_part(tensor, moments.parameter) if of_elements else tensor
                    )
        return any(p in found for p in self.compressed)

    def _fill(self, state: ParameterState, saved: dict[str, Tensor], position: int) -> None:
        p = self.compressed[position]
        for name, tensor in saved.items():
            name = self._mine(name)
            if name not in state:
                continue
            local = state[name]
            if name == "plain":
                self._fill_plain(local, tensor, position)
            elif local.dim() == 0:
                local.copy_(tensor)
            else:
                if isinstance(tensor, DTensor) and self.parts.lies_as_shard(position):
                    own = _local_part(tensor, p)
                else:
                    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
                    own = self.parts.own(position, tensor.to(p.device))
                local.copy_(own.reshape(local.shape))

    def _fill_plain(self, local: Tensor, tensor: Tensor, position: int) -> None:
        """A parameter's master copy, saved in the parameter's own shape."""
        p, whole, layout = self.compressed[position], self.wholes[position], self.parts.layouts
        if self.parts.lies_as_shard(position):
            local.copy_(_local_part(tensor, p))
            return
        tensor = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).to(p.device)
        own = self.parts.own(position, _chunks(tensor.contiguous(), whole))
        _chunks(local, layout[position]).copy_(own.reshape(layout[position].xshape))

    def _mine(self, name: str) -> str:
        """What a saved name is called here; states without numbers are everyone's."""
        return name + self.suffix if name == "delta" else name

    def portable(self) -> dict[Tensor, dict[str, Tensor]]:
        """See `PeerOptimizer.state_dict`."""
        result: dict[Tensor, dict[str, Tensor]] = {}
        for position, p in enumerate(self.compressed):
            result[p] = {}
            layout = self.parts.layouts[position]
            for name, local in self.states[position].items():
                if local.dim() == 0:
                    result[p][name] = local.clone()
                elif name != "plain":
                    # as all_gather takes it on every backend
                    local = local.to(torch.int32) if local.dtype in _UNSIGNED else local
                    result[p][name] = self.parts.whole(position, local)
                elif self.parts.lies_as_shard(position):
                    result[p][name] = placed_like(local, p) if isinstance(p, DTensor) else local
                else:
                    chunks = _chunks(local, layout).contiguous()
                    whole = self.wholes[position]
                    result[p][name] = _decoded(self.parts.whole(position, chunks), whole)
        for moments in self.adamw.members:
            p = moments.parameter
            result[p] = {
                name: placed_like(t, p) if isinstance(p, DTensor) and name != "step" else t
                for name, t in moments.state.items()
            }
        return result

    def check(self, p: Tensor, saved: dict[str, Tensor]) -> None:
        """Check the saved state of a parameter.

        Raises:
            ValueError: something is missing or cut otherwise; the parameter is named.
        """
        for moments in self.adamw.members:
            if moments.parameter is p:
                for name, local in moments.state.items():
                    if name not in saved:
                        raise ValueError(
                            f"{name} of parameter {moments.name} is missing from the saved state"
                        )
                    shape = p.shape if name != "step" else local.shape
                    if saved[name].shape != shape:
                        raise ValueError(
                            f"{name} of parameter {moments.name} is {list(saved[name].shape)} in "
                            f"the saved state, but {list(shape)} in this run"
                        )
        for position, (other, whole) in enumerate(zip(self.compressed, self.wholes, strict=True)):
            if other is p:
                self._check_compressed(position, whole, saved)

    def _check_compressed(
        self, position: int, whole: ParameterLayout, saved: dict[str, Tensor]
    ) -> None:
        known = {self._mine(name) for name in saved}
        for name in self.states[position]:
            kind = name.partition(_OF_A_REPLICA)[0]
            if name in known:
                continue
            others = [n for n in saved if n.startswith(kind + _OF_A_REPLICA)]
            if others:
                there = ", ".join(sorted(n.rpartition("-")[2] for n in others))
                raise ValueError(
                    f"{kind} of parameter {whole.name} is of replica {there} in the saved state, "
                    f"and this is replica {self.replica}: each has to load what it has saved "
                    "itself, or all together by torch.distributed.checkpoint"
                )
            raise ValueError(f"{kind} of parameter {whole.name} is missing from the saved state")
        for name, tensor in saved.items():
            if self._mine(name) == "delta" + self.suffix:
                check_delta_shape(whole, tensor)


def settings_of(optimizer: Planned) -> list[object]:
    """What decides which parameters are trained, how, and how they are cut."""
    return [
        (
            [(id(p), p.requires_grad) for p in group["params"]],
            group["method"],
            group.get("compression_chunk"),
            group.get("compression_topk"),
        )
        for group in optimizer.param_groups
    ]


def peers_now(optimizer: Planned) -> object:
    """The group to exchange with, as far as the user has said it."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    return optimizer.process_group or dist.group.WORLD


def _local_part(tensor: Tensor, like: Tensor) -> Tensor:
    """A rank's part of a tensor that is whole, or distributed somehow, placed as `like` is."""
    if not isinstance(like, DTensor):
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    mesh, placements = like.device_mesh, like.placements
    if isinstance(tensor, DTensor):
        if tensor.device_mesh == mesh:
            return tensor.redistribute(placements=placements).to_local()
        tensor = tensor.full_tensor()
    # src_data_rank=None: every rank holds the same whole tensor.
    tensor = tensor.to(like.device)
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None).to_local()


def _chunks(local: Tensor, layout: ParameterLayout) -> Tensor:
    """A view of a tensor of a layout's shape in the encoded shape."""
    return chunk_view(local, layout.h, layout.w).view(layout.xshape)


def _decoded(encoded: Tensor, whole: ParameterLayout) -> Tensor:
    """A tensor in the encoded shape brought back to the parameter's."""
    if len(whole.shape) < 2:
        return encoded.reshape(whole.shape)
    return encoded.transpose(-3, -2).reshape(whole.shape)
