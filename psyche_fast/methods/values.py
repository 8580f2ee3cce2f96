"""As what the selected values travel: the codes, and what the receivers make of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from psyche_fast.kernels import quantise as blockwise
from psyche_fast.kernels.plan import ChunkPlan
from psyche_fast.kernels.quantise import Bits, Codes
from psyche_fast.methods.method import Values

_BINS, _RANGE = 4, 6  # the references' codebook

BITS: dict[Values, Bits] = {"2bit": 2, "4bit": 4, "8bit": 8, "codebook4": 2}
"""Bits of a code."""


def scales_of(plan: ChunkPlan, kind: Values) -> tuple[torch.dtype, tuple[int, int]]:
    """Dtype and shape of a class's scales."""
    if kind == "codebook4":
        return torch.float32, (len(plan.members), _BINS)
    dtype, count = blockwise.scales_like(BITS[kind])
    return dtype, (plan.chunks, count)


def quantise(plan: ChunkPlan, kind: Values, values: Tensor) -> Codes:
    """The codes of values `[n, k]`."""
    return coded(plan, kind, values)[0]


def coded(
    plan: ChunkPlan, kind: Values, values: Tensor, backend: str = "torch"
) -> tuple[Codes, Tensor]:
    """The codes of values `[n, k]`, and the values that receivers see.

    - "2bit", "4bit", "8bit": as `psyche_fast.kernels.quantise` has them, each chunk by itself.
    - "codebook4": one codebook for all values of a parameter, as SparseLoCo's and MuLoCo's code has
      it: with mean m and sample deviation s, bin `clamp(round((v - m) / 1.5 s + 2), 0, 3)`, and for
      each bin the mean of what fell there (m where nothing did), float32. It is there for
      comparison, in plain PyTorch on any device.
    """
    if kind != "codebook4":
        return blockwise.quantise(plan, values, BITS[kind], backend=backend)
    codes = _codebook(plan, values)
    return codes, _looked_up(plan, codes)


def dequantise(plan: ChunkPlan, kind: Values, codes: Codes, backend: str = "torch") -> Tensor:
    """Values `[n, k]`, or `[peers, n, k]`, in the compute dtype: what receivers see."""
    if kind == "codebook4":
        return _looked_up(plan, codes)
    if codes.codes.dim() == 2:
        codes = Codes(codes.codes[None], codes.scales[None])
        return blockwise.dequantise(plan, codes, BITS[kind], backend=backend)[0]
    return blockwise.dequantise(plan, codes, BITS[kind], backend=backend)


def scale_bytes(plan: ChunkPlan, kind: Values) -> int:
    """Bytes of a class's scales."""
    if kind not in BITS:
        return 0
    dtype, shape = scales_of(plan, kind)
    return dtype.itemsize * math.prod(shape)


def _looked_up(plan: ChunkPlan, codes: Codes) -> Tensor:
    counts = torch.tensor([m.count for m in plan.members], device=codes.codes.device)
    tables = codes.scales.to(plan.compute_dtype).repeat_interleave(counts, dim=-2)
    return tables.gather(-1, codes.codes.to(torch.int64))


def _codebook(plan: ChunkPlan, values: Tensor) -> Codes:
    tables = values.new_zeros(len(plan.members), _BINS, dtype=torch.float32)
    codes = torch.empty(values.shape, dtype=torch.uint8, device=values.device)
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
        code = (centred / step + _BINS // 2).round_().clamp_(0, _BINS - 1).to(torch.uint8)
        sums = torch.zeros(_BINS, dtype=own.dtype, device=own.device)
        for at in range(_BINS):
            chosen = code == at
            sums[at] = torch.where(chosen, centred, 0.0).sum() / chosen.sum().clamp(min=1)
        tables[slot] = mean + sums
        codes[rows] = code.view(member.count, -1)
    return Codes(codes, tables)


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
