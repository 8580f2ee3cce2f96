"""What a `DistroStep` has, by parameter and chunk, whatever ranks it is divided among."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from psyche_fast.distro.optimizer import DistroStep
from psyche_fast.kernels.plan import Entries


def chunk_numbers(step: DistroStep) -> dict[str, Tensor]:
    """Which of each whole parameter's chunks this rank works on: int64 `[n]`, on the CPU."""
    parts = step.parts
    numbers = {}
    for at, (name, p, whole) in enumerate(
        zip(step.names, parts.parameters, parts.wholes, strict=True)
    ):
        every = torch.arange(whole.chunks, device=p.device).view(whole.lead)
        numbers[name] = parts.own(at, every).reshape(-1).cpu()
    return numbers


def chunk_counts(step: DistroStep) -> dict[str, int]:
    """How many chunks each whole parameter has, by name."""
    wholes = step.parts.wholes
    return {name: whole.chunks for name, whole in zip(step.names, wholes, strict=True)}


def by_name(step: DistroStep, buffers: Sequence[Tensor]) -> dict[str, Tensor]:
    """Views `[n, ...]` by parameter of what lies chunk after chunk for each plan."""
    return {
        step.names[m.position]: buffer[m.start : m.start + m.count]
        for plan, buffer in zip(step.layout.plans, buffers, strict=True)
        for m in plan.members
    }


def entries_by_name(step: DistroStep, entries: Sequence[Entries], kind: str) -> dict[str, Tensor]:
    """`KIND/NAME/indices` and `KIND/NAME/values`, `[n, m]` each."""
    indices = by_name(step, [e.indices for e in entries])
    values = by_name(step, [e.values for e in entries])
    return {
        f"{kind}/{name}/{what}": tensor
        for what, tensors in (("indices", indices), ("values", values))
        for name, tensor in tensors.items()
    }


def entries_of(step: DistroStep, state: Mapping[str, Tensor], kind: str) -> list[Entries]:
    """What `entries_by_name` gave, plan by plan, on the plans' devices."""
    entries = []
    for plan in step.layout.plans:
        names = [step.names[m.position] for m in plan.members]
        indices, values = (
            torch.cat([state[f"{kind}/{name}/{what}"] for name in names]).to(plan.device)
            for what in ("indices", "values")
        )
        entries.append(Entries(indices, values, unique=indices.shape[1] == plan.k))
    return entries
