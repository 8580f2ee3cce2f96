"""Parameter groups of `DeMo` and `DisTrO`: their options, and who the peers of their ranks are."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from psyche_fast.devices import message_for
from psyche_fast.distro.chunks import check_compression

ADAMW = "adamw"
_ADAMW_DEFAULTS = {"betas": (0.9, 0.999), "eps": 1e-8}
_OF_THE_OPTIMISER = ("compression_decay", "process_group", "backend", "quantize")
_COMPRESSION = ("compression_topk", "compression_chunk")
# Other optimisers' flags which would change what a step does, or how it may be used.
_REFUSED = {
    "maximize": "negate the loss",
    "capturable": "a step talks to other ranks, which no CUDA graph can hold",
    "differentiable": "a step is not differentiable: it takes signs",
    "amsgrad": "AdamW has no such variant here",
    "nesterov": "the momentum is delta",
    "momentum": "compression_decay is the momentum's",
    "dampening": "compression_decay is the momentum's",
}

_Init = TypeVar("_Init", bound=Callable[..., None])


def accepts_references_order(init: _Init) -> _Init:
    """Has a constructor also take the arguments of the reference DeMo as they stand.

    There `lr` is a keyword, and what follows the parameters are `compression_decay` and the others
    in the order in which they follow `lr` here.
    """

    @functools.wraps(init)
    def wrapped(self: Any, params: Any, *settings: Any, **named: Any) -> None:
        if settings and "lr" in named:
            settings = (named.pop("lr"), *settings)
        init(self, params, *settings, **named)

    return wrapped  # type: ignore[return-value]


def refuse_flags(flags: dict[str, Any], what: str) -> None:
    """Check flags that other optimisers of torch have.

    `foreach` and `fused` may be anything: a step is one launch for all chunks of a shape, whatever
    they say.

    Raises:
        ValueError: one is set that cannot be had.
    """
    for name, why in _REFUSED.items():
        if flags.get(name):
            raise ValueError(f"{what} does not take {name}={flags[name]}: {why}")


def complete_group(group: dict[str, Any], own_method: str, decay: float, what: str) -> None:
    """Check a parameter group and give it the options that its method has.

    Args:
        group: with the optimiser's defaults where it has no options of its own.
        own_method: the optimiser's; `"adamw"` is the other one that a group may name.
        decay: the optimiser's `compression_decay`.
        what: the optimiser's name, for messages.

    Raises:
        ValueError: a setting out of range or unknown.
    """
    refuse_flags(group, what)
    method = group["method"]
    if method not in (own_method, ADAMW):
        raise ValueError(
            f"a parameter group's method must be {own_method!r} or {ADAMW!r}, got {method!r}"
        )
    if method == ADAMW:
        for name in _COMPRESSION:
            group.pop(name, None)
        for name, value in _ADAMW_DEFAULTS.items():
            group.setdefault(name, value)
        betas = group["betas"]
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be two numbers of at least 0 and below 1, got {betas}")
        if not 0 <= group["eps"] < math.inf:
            raise ValueError(f"eps must be a number and not negative, got {group['eps']}")
        if not 0 <= group["weight_decay"] < math.inf:
            raise ValueError(
                f"weight_decay must be a number and not negative, got {group['weight_decay']}"
            )
    else:
        for name in _ADAMW_DEFAULTS:
            if name in group:
                raise ValueError(f"{name} is for groups with method={ADAMW!r}")
        check_compression(
            decay, group["compression_topk"], group["compression_chunk"], group["weight_decay"]
        )
    check_rates(group)


def check_options(group: dict[str, Any]) -> None:
    """Check that a group names nothing that only the optimiser as a whole has, or its method not.

    Args:
        group: as its user has written it.

    Raises:
        ValueError: it does.
    """
    for name in _OF_THE_OPTIMISER:
        if name in group:
            raise ValueError(f"{name} is the optimiser's; a group cannot have its own")
    if group.get("method") == ADAMW:
        for name in _COMPRESSION:
            if name in group:
                raise ValueError(f"{name} is not for groups with method={ADAMW!r}")


def check_rates(group: dict[str, Any]) -> None:
    """Check a group's numbers that may change between steps.

    Raises:
        ValueError: one is no number, or negative.
    """
    for name in ("lr", "weight_decay"):
        value = group[name]
        known = not isinstance(value, Tensor) or value.device.type == "cpu"
        if known and not 0 <= float(value) < math.inf:
            raise ValueError(f"{name} must be a number and not negative, got {value}")


def check_gradient(name: str, gradient: Tensor | None) -> None:
    """Check that a gradient is of real numbers.

    Raises:
        TypeError: it is complex; the parameter is named.
    """
    if gradient is not None and gradient.is_complex():
        raise TypeError(f"parameter {name} has a complex gradient ({gradient.dtype}), wanted real")


def parameter_name(group: dict[str, Any], i: int, position: int) -> str:
    """What messages call a parameter: its name if the optimiser was given names."""
    names = group.get("param_names")
    return str(names[i]) if names else f"number {position}"


def peers_of(
    parameters: Sequence[Tensor], process_group: dist.ProcessGroup | None, what: str
) -> dist.ProcessGroup | None:
    """The ranks that hold the same part of the parameters in other replicas.

    Args:
        parameters: all that are trained.
        process_group: what the user said.
        what: the optimiser's name, for messages.

    Returns:
        None where there is nobody else.

    Raises:
        ValueError: the parameters are distributed, and the peers are not given, or among those that
            they are distributed over: their gradients would be dense averages over the replicas.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return None
    meshes = {p.device_mesh: None for p in parameters if isinstance(p, DTensor)}
    mine, world = dist.get_rank(), set(range(dist.get_world_size()))
    over = {rank for mesh in meshes for rank in mesh.mesh.flatten().tolist()} - {mine}
    for mesh in meshes:
        _refuse_replicated(mesh, parameters, what)
    if process_group is None:
        if not over:
            return dist.group.WORLD
        if over == world - {mine}:
            return None
        raise ValueError(
            f"parameters are distributed over ranks {sorted({*over, mine})} of {len(world)}: "
            f"{what} has to be told which ranks hold the same shard in other replicas, as "
            "process_group=mesh.get_group('replicate') or the like"
        )
    both = over & set(dist.get_process_group_ranks(process_group))
    if both:
        raise ValueError(
            f"ranks {sorted(both)} are peers of this rank by process_group, and parameters are "
            f"distributed over them: {_advice(what)}"
        )
    return process_group


def _refuse_replicated(mesh: Any, parameters: Iterable[Tensor], what: str) -> None:
    on_mesh = [p for p in parameters if isinstance(p, DTensor) and p.device_mesh == mesh]
    for axis in range(mesh.ndim):
        if mesh.size(axis) > 1 and all(p.placements[axis].is_replicate() for p in on_mesh):
            name = mesh.mesh_dim_names[axis] if mesh.mesh_dim_names else f"number {axis}"
            raise ValueError(
                f"all parameters are replicated along the mesh's dimension {name}, whose ranks "
                f"average their gradients: {_advice(what)}"
            )


def _advice(what: str) -> str:
    return (
        f"{what} wants each replica's own gradients. Shard inside a replica alone, with "
        "fully_shard(model, mesh=mesh['shard']), and give the other dimension to the optimiser, "
        "process_group=mesh.get_group('replicate')"
    )


def copied_rate(rate: float | Tensor) -> float | Tensor:
    """A learning rate that a scheduler does not change."""
    return rate.detach().clone() if isinstance(rate, Tensor) else rate


def highest(flags: Tensor, groups: Iterable[dist.ProcessGroup]) -> Tensor:
    """The largest of each flag on any rank; a collective of the groups, one after the other."""
    flags = flags.to(torch.float32)
    for group in groups:
        staged = message_for(group, flags.clone())
        dist.all_reduce(staged, dist.ReduceOp.MAX, group=group)
        flags = staged.to(flags.device)
    return flags
