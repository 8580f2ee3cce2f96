"""Modules without weights: parameters on the meta device, buffers real, and back to life."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from psyche_fast.sharding import local_tensor, placed_like


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules built in here have parameters on the meta device, but real buffers.

    Buffers that no checkpoint holds (rotary frequencies, masks, sinusoids) are computed by the
    module's own constructor and are garbage once it ran on the meta device. Moving each parameter
    as it is registered gives both: nothing is allocated for more than one parameter at a time, and
    every buffer of every architecture has its right value.
    """
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        original(module, name, param)
        if param is not None and not param.is_meta:
            meta = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
            meta.__dict__.update(param.__dict__)
            module._parameters[name] = meta

    nn.Module.register_parameter = register  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def tied_names(module: nn.Module) -> dict[str, str]:
    """For each name of a shared parameter but the first, that first name."""
    first: dict[int, str] = {}
    aliases = {}
    for name, param in module.named_parameters(remove_duplicate=False):
        canonical = first.setdefault(id(param), name)
        if canonical != name:
            aliases[name] = canonical
    return aliases


def tie(module: nn.Module, aliases: dict[str, str]) -> None:
    """Makes each alias the parameter of its first name again."""
    for alias, name in aliases.items():
        owner, _, leaf = alias.rpartition(".")
        setattr(module.get_submodule(owner), leaf, module.get_parameter(name))


def master_copies(module: nn.Module) -> dict[str, Tensor]:
    """Memory for fp32 copies of the trained parameters of narrower types, placed as they are."""
    copies: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            local = torch.empty_like(local_tensor(parameter.detach()), dtype=torch.float32)
            whole: Tensor = parameter  # which FSDP2 makes a DTensor, whatever its class says
            copies[name] = placed_like(local, whole) if isinstance(whole, DTensor) else local
    return copies


def materialise(module: nn.Module, device: torch.device, aliases: dict[str, str]) -> None:
    """Allocates the parameters (this rank's parts) on `device` and moves the buffers there.

    Raises:
        ValueError: a buffer that no checkpoint holds was built on the meta device.
    """
    buffers: dict[str, Tensor] = dict(module.named_buffers(remove_duplicate=False))
    in_checkpoint = module.state_dict().keys()
    lost = [n for n, b in buffers.items() if b.is_meta and n not in in_checkpoint]
    if lost:
        raise ValueError(f"the architecture builds the buffers {', '.join(lost)} without values")
    module.to_empty(device=device)
    tie(module, aliases)
    for name, buffer in module.named_buffers(remove_duplicate=False):
        if not buffers[name].is_meta:
            buffer.copy_(buffers[name])
