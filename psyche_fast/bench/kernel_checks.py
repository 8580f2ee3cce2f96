"""Float64 on a sample of chunks: what `kernel_cases.py` compares kernels with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from psyche_fast.bench.plain_demo import dct
from psyche_fast.kernels.plan import ChunkPlan, Entries, chunk_view

RATE = 4e-4
SAMPLED = 256
"""Chunks of every class that are compared with float64."""
# The plain formulation transforms in the parameters' dtype, as the reference DeMo does.
LOOSE = {"agreement": 0.9, "state": 2e-2, "flips": 3e-2}
TIGHT = {"agreement": 0.995, "state": 2e-4, "flips": 2e-3}


def members(plan: ChunkPlan, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Of one tensor per parameter those of a class's members."""
    return [tensors[m.position] for m in plan.members]


def chosen(plan: ChunkPlan) -> Tensor:
    """Numbers of the chunks that are compared, on the CPU."""
    if plan.chunks <= SAMPLED:
        return torch.arange(plan.chunks)
    return torch.linspace(0, plan.chunks - 1, SAMPLED).long()


def of_parameters(plan: ChunkPlan, tensors: Sequence[Tensor]) -> Tensor:
    """The compared chunks of one tensor per member, float64 `[n, h, w]` on the CPU."""
    ids, parts = chosen(plan), []
    for m, tensor in zip(plan.members, tensors, strict=True):
        local = ids[(ids >= m.start) & (ids < m.start + m.count)] - m.start
        at = tuple(i.to(tensor.device) for i in torch.unravel_index(local, m.lead))
        parts.append(chunk_view(tensor, plan.h, plan.w)[at].cpu().double())
    return torch.cat(parts)


def of_state(plan: ChunkPlan, tensor: Tensor) -> Tensor:
    """The compared chunks of a chunk-major tensor, float64 on the CPU."""
    return tensor[chosen(plan).to(tensor.device)].cpu().double()


def of_entries(plan: ChunkPlan, entries: Entries) -> tuple[Tensor, Tensor]:
    """The compared chunks' indices, and values as float64 numbers."""
    ids = chosen(plan).to(entries.indices.device)
    # Indexing is not implemented for every unsigned dtype.
    index = entries.indices.view(torch.uint8).unflatten(1, (-1, plan.index_dtype.itemsize))
    index = index[ids].cpu().flatten(1).view(plan.index_dtype).long()
    value = entries.values[ids].cpu()
    return index, 1.0 - 2.0 * value.double() if value.dtype == torch.bool else value.double()


def bases(plan: ChunkPlan) -> tuple[Tensor, Tensor]:
    """The transforms of a chunk's columns and rows, float64."""
    return dct(plan.h), dct(plan.w)


def decoded(plan: ChunkPlan, index: Tensor, value: Tensor) -> Tensor:
    """Mean of the entries of each coefficient, transformed back, float64 `[n, h, w]`."""
    sums = torch.zeros(len(index), plan.totalk, dtype=torch.float64)
    counts = torch.zeros_like(sums)
    sums.scatter_add_(1, index, value)
    counts.scatter_add_(1, index, torch.ones_like(value))
    left, right = bases(plan)
    return left @ (sums / counts.clamp(min=1)).view(-1, plan.h, plan.w) @ right.t()


def distance(actual: Tensor, exact: Tensor) -> float:
    """The error's norm beside that of what is right."""
    return float((actual - exact).norm() / exact.norm().clamp(min=1e-300))


def flipped(actual: Tensor, exact: Tensor) -> float:
    """Share of elements that are off by more than rounding: that went the other way."""
    return float(((actual - exact).abs() > 0.7 * RATE).double().mean())


def verdict(name: str, figures: dict[str, float]) -> dict[str, Any]:
    """Adds "ok" to what a check has found."""
    limits = LOOSE if name == "plain" else TIGHT
    good = figures.get("agreement", 1.0) >= limits["agreement"] and all(
        figures.get(key, 0.0) <= limits[key] for key in ("state", "flips")
    )
    return {"ok": good, "against": f"float64, up to {SAMPLED} chunks of every class", **figures}


def worst(figures: list[dict[str, float]]) -> dict[str, float]:
    """Of every class's figures the worst."""
    pick = {"agreement": min}
    return {key: pick.get(key, max)(f[key] for f in figures) for key in figures[0]}


def selection(plan: ChunkPlan, state: Tensor, index: Tensor, value: Tensor) -> dict[str, float]:
    """How many indices are those that float64 takes, and the values' error."""
    left, right = bases(plan)
    coefficients = (left.t() @ state @ right).flatten(1)
    best = coefficients.abs().topk(plan.k, dim=1).indices
    hits = torch.zeros_like(coefficients).scatter_(1, best, 1.0).gather(1, index)
    error = distance(value, coefficients.gather(1, index))
    # Values are rounded to the parameters' dtype.
    return {"agreement": float(hits.mean()), "values": max(0.0, error - 2.0**-9)}
