"""As what the selected values travel: the codes, and what the receivers make of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from psyche_fast.kernels.plan import ChunkPlan
from psyche_fast.methods.method import Values

_LLOYD = 8
_BINS, _RANGE = 4, 6  # the references' codebook

PLANES = {"2bit": 1, "4bit": 3, "8bit": 7, "codebook4": 1}
"""Bits of a code beside the one that travels as a sign."""

_SCALES = {"2bit": (torch.bfloat16, 2), "4bit": (torch.float32, 1), "8bit": (torch.float32, 1)}


@dataclass(frozen=True)
class Codes:
    """Quantised values of one chunk class, of one replica or of several.

    Attributes:
        upper: bool `[.., n, k]`: signs, True where negative; the upper bit of a codebook's codes.
        lower: uint8 `[.., n, k]`, the other bits.
        scales: of each chunk `[.., n, s]`; a codebook's values of each parameter `[.., members,
            4]`.
    """

    upper: Tensor
    lower: Tensor
    scales: Tensor


def scales_of(plan: ChunkPlan, kind: Values) -> tuple[torch.dtype, tuple[int, int]]:
    """Dtype and shape of a class's `scales`."""
    if kind == "codebook4":
        return torch.float32, (len(plan.members), _BINS)
    dtype, count = _SCALES[kind]
    return dtype, (plan.chunks, count)


def quantise(plan: ChunkPlan, kind: Values, values: Tensor) -> Codes:
    """The codes of values `[n, k]`.

    - "2bit": sign, and one of two levels of the chunk's magnitudes, bfloat16: eight of Lloyd's
      iterations from the mean.
    - "4bit", "8bit": whole multiples, halves to even, of the chunk's largest magnitude divided by 7
      or 127, float32.
    - "codebook4": one codebook for all values of a parameter, as SparseLoCo's and MuLoCo's code has
      it: with mean m and sample deviation s, bin `clamp(round((v - m) / 1.5 s + 2), 0, 3)`, and for
      each bin the mean of what fell there (m where nothing did), float32.
    """
    if kind == "codebook4":
        return _codebook(plan, values)
    magnitudes = values.abs()
    if kind == "2bit":
        levels = _two_levels(magnitudes)
        wide = levels.to(values.dtype)
        lower = magnitudes > wide.mean(1, keepdim=True)
        return Codes(values < 0, lower.to(torch.uint8), levels)
    most = (1 << PLANES[kind]) - 1
    scale = (magnitudes.amax(1, keepdim=True) / most).to(torch.float32)
    wide = scale.to(values.dtype)
    multiples = torch.where(wide > 0, magnitudes / wide, 0.0).round_().clamp_(max=most)
    return Codes(values < 0, multiples.to(torch.uint8), scale)


def dequantise(plan: ChunkPlan, kind: Values, codes: Codes) -> Tensor:
    """Values `[.., n, k]` in the compute dtype: what receivers see."""
    scales = codes.scales.to(plan.compute_dtype)
    if kind == "codebook4":
        counts = torch.tensor([m.count for m in plan.members], device=scales.device)
        tables = scales.repeat_interleave(counts, dim=-2)
        index = codes.lower.to(torch.int64).add_(codes.upper, alpha=2)
        return tables.gather(-1, index)
    if kind == "2bit":
        low, high = scales.split(1, dim=-1)
        magnitudes = torch.where(codes.lower.bool(), high, low)
    else:
        magnitudes = scales * codes.lower
    return torch.where(codes.upper, -magnitudes, magnitudes)


def _two_levels(magnitudes: Tensor) -> Tensor:
    """Lower and upper level of each row, bfloat16 `[n, 2]`."""
    k = magnitudes.shape[1]
    total = magnitudes.sum(1, keepdim=True)
    low = high = total / k
    for _ in range(_LLOYD):
        is_high = magnitudes > (low + high) / 2
        count = is_high.sum(1, keepdim=True)
        upper = torch.where(is_high, magnitudes, 0.0).sum(1, keepdim=True)
        high = torch.where(count > 0, upper / count.clamp(min=1), low)
        lower = torch.where(is_high, 0.0, magnitudes).sum(1, keepdim=True)
        low = torch.where(count < k, lower / (k - count).clamp(min=1), high)
    return torch.cat([low, high], dim=1).to(torch.bfloat16)


def _codebook(plan: ChunkPlan, values: Tensor) -> Codes:
    tables = values.new_zeros(len(plan.members), _BINS, dtype=torch.float32)
    codes = torch.empty(values.shape, dtype=torch.int64, device=values.device)
    for slot, member in enumerate(plan.members):
        rows = slice(member.start, member.start + member.count)
        own = values[rows].reshape(-1)
        if own.numel() == 0:
            continue
        mean = own.mean()
        centred = own - mean
        deviation = (centred.square().sum() / (own.numel() - 1)).sqrt()
        step = deviation * _RANGE / _BINS
        step = torch.where((step > 0) & step.isfinite(), step, 1.0)
        code = (centred / step + _BINS // 2).round_().clamp_(0, _BINS - 1).to(torch.int64)
        sums = torch.zeros(_BINS, dtype=own.dtype, device=own.device)
        for at in range(_BINS):
            chosen = code == at
            sums[at] = torch.where(chosen, centred, 0.0).sum() / chosen.sum().clamp(min=1)
        tables[slot] = mean + sums
        codes[rows] = code.view(member.count, -1)
    return Codes(codes >= 2, (codes & 1).to(torch.uint8), tables)


def pack_bits(codes: Tensor, planes: int) -> Tensor:
    """The lower bits of codes `[n, k]`, a plane after the other, each in whole bytes: uint8."""
    flat = codes.reshape(-1)
    flat = torch.cat([flat, flat.new_zeros(-flat.numel() % 8)])
    weights = (1 << torch.arange(8, device=codes.device)).to(torch.uint8)
    bits = [((flat >> plane) & 1).view(-1, 8).mul(weights).sum(1) for plane in range(planes)]
    return torch.cat(bits).to(torch.uint8)


def unpack_bits(data: Tensor, planes: int, shape: Sequence[int]) -> Tensor:
    """What `pack_bits` packed, of each row of uint8 `[peers, bytes]`: uint8 `[peers, *shape]`."""
    count = math.prod(shape)
    places = torch.arange(8, device=data.device, dtype=torch.uint8)
    bits = ((data.unsqueeze(-1) >> places) & 1).view(len(data), planes, -(-count // 8) * 8)
    codes = torch.zeros(len(data), count, dtype=torch.uint8, device=data.device)
    for plane, part in enumerate(bits[:, :, :count].unbind(1)):
        codes |= part << plane
    return codes.view(len(data), *shape)


def packed_bytes(plan: ChunkPlan, kind: Values) -> int:
    """Bytes of a class's scales and of its lower bits."""
    if kind not in PLANES:
        return 0
    dtype, shape = scales_of(plan, kind)
    return dtype.itemsize * math.prod(shape) + lower_bytes(plan, kind)


def lower_bytes(plan: ChunkPlan, kind: Values) -> int:
    """Bytes of a class's lower bits."""
    return PLANES[kind] * (-(-plan.chunks * plan.k // 8))
