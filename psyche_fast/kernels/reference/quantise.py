"""Blockwise quantisation in plain PyTorch, in blocks that stay in the cores' caches.

Comparisons have results in floating point: those of bool are several times slower.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from psyche_fast.kernels.plan import ChunkPlan, Rates, Slice
from psyche_fast.kernels.quantise import Bits, Codes, scales_like
from psyche_fast.kernels.reference.encode import Sources, take_up
from psyche_fast.kernels.reference.workspace import COUNTS, MAGNITUDES, RESULT, SUMS, scratch

LLOYD = 8
_BLOCK = 1 << 18  # elements
_BLOCKS = 1 << 20  # of 2 bits, whose levels take calls for each row that cost more than elements
_LEAST = 2.0**-100  # of a chunk's largest magnitude; below it all are as good as 0
_LEAST_EXPONENT = -100


def quantise(plan: ChunkPlan, values: Tensor, bits: Bits) -> tuple[Codes, Tensor]:
    """See `psyche_fast.kernels.quantise.quantise`."""
    codes, seen = _empty(len(values), values.shape[1], values, bits), torch.empty_like(values)
    for rows in _blocks(values, bits):
        seen[rows] = _quantised(values[rows], bits, codes.codes[rows], codes.scales[rows])
    return codes, seen


def dequantise(plan: ChunkPlan, codes: Codes, bits: Bits) -> Tensor:
    """See `psyche_fast.kernels.quantise.dequantise`."""
    values = torch.empty(codes.codes.shape, dtype=plan.compute_dtype, device=codes.codes.device)
    for code, scales, out in zip(codes.codes, codes.scales, values, strict=True):
        for rows in _blocks(out):
            wide = scales[rows].to(out.dtype)
            if bits == 2:
                _levels(code[rows], wide, out[rows])
            else:
                torch.mul(_signed(code[rows])[0].to(out.dtype), wide, out=out[rows])
    return values


def encode_all(
    plan: ChunkPlan,
    delta: Tensor | None,
    gradients: Sequence[Tensor | None],
    learning_rates: Rates,
    bits: Bits | None,
    out: Tensor | None,
    decay: float,
    gradient_scale: float | Tensor | None,
    anchors: Sequence[Tensor] | None,
    share: float,
    exact: bool,
) -> Codes | None:
    """See `psyche_fast.kernels.quantise.encode_all`."""
    sources = Sources(plan, gradients, learning_rates, gradient_scale, anchors)
    codes = None if bits is None else _empty(plan.chunks, plan.totalk, plan.basis_w, bits)
    for part in plan.slices:
        if delta is None and out is not None and out.dtype == plan.compute_dtype:
            sources.write_to(out[part.start : part.stop].view(-1, plan.h, plan.w), part)
            continue
        chunks = _taken_up(plan, delta, part, decay, sources)
        flat = chunks.view(len(chunks), plan.totalk)
        for block in _blocks(flat, bits):
            x = flat[block]
            rows = slice(part.start + block.start, part.start + block.stop)
            if codes is not None:
                assert bits is not None
                seen = _quantised(x, bits, codes.codes[rows], codes.scales[rows])
            else:
                assert out is not None
                out[rows].copy_(x)
                seen = x if exact or not share else out[rows].to(x.dtype)
            if share:
                x.sub_(x if exact else seen, alpha=share)
    return codes


def _taken_up(
    plan: ChunkPlan, delta: Tensor | None, part: Slice, decay: float, sources: Sources
) -> Tensor:
    """A slice's chunks, in the state where there is one."""
    if delta is not None:
        return take_up(plan, delta, part, decay, sources, None)
    chunks = scratch(RESULT, (part.stop - part.start, plan.h, plan.w), plan.basis_w)
    sources.write_to(chunks, part)
    return chunks


def _empty(n: int, k: int, like: Tensor, bits: Bits) -> Codes:
    dtype, count = scales_like(bits)
    return Codes(
        torch.empty(n, k, dtype=torch.uint8, device=like.device),
        torch.empty(n, count, dtype=dtype, device=like.device),
    )


def _blocks(values: Tensor, bits: int | None = None) -> list[slice]:
    """Runs of rows that are worked on together."""
    n, k = values.shape
    limit = _BLOCKS if bits == 2 else _BLOCK
    step = max(1, (limit if values.device.type == "cpu" else 1 << 25) // max(1, k))
    return [slice(at, min(at + step, n)) for at in range(0, n, step)]


def _quantised(x: Tensor, bits: Bits, codes: Tensor, scales: Tensor) -> Tensor:
    """Write the codes and scales of values `[n, k]`; what they say, good until the next call."""
    magnitudes = torch.abs(x, out=scratch(MAGNITUDES, tuple(x.shape), x))
    most = magnitudes.amax(1, keepdim=True)
    if bits == 2:
        scales.copy_(_two_levels(magnitudes, most))
        levels = scales.to(x.dtype)
        middle = levels.mul(0.5).sum(1, keepdim=True)
        for rows in _blocks(x):
            own, code = magnitudes[rows], codes[rows]
            upper, negative = (scratch(slot, tuple(own.shape), x) for slot in (SUMS, COUNTS))
            torch.gt(own, middle[rows], out=upper)
            torch.lt(x[rows], 0.0, out=negative)
            torch.add(negative, upper, alpha=2, out=own)
            code.view(torch.int8).copy_(own)  # 0 to 3; a conversion to uint8 is slower
            _levels(code, levels[rows], own)
        return magnitudes
    limit = (1 << (bits - 1)) - 1
    # By a tensor: on a GPU torch multiplies by the reciprocal of a number instead of dividing.
    scales.copy_(torch.where(most >= _LEAST, most / most.new_full((), limit), 0.0))
    wide = scales.to(x.dtype)
    inverse = torch.where(scales > 0, _newton(scales.clamp(min=_LEAST / 256)), 0.0).to(x.dtype)
    multiples = torch.mul(x, inverse, out=magnitudes).round_().clamp_(-limit, limit)
    signed = multiples.to(torch.int8)
    negative = signed.view(torch.uint8) >> 7
    torch.add(signed.abs().view(torch.uint8) * 2, negative, out=codes)
    return multiples.mul_(wide)


def _signed(codes: Tensor) -> tuple[Tensor, Tensor]:
    """What is above the sign, with it, and the signs alone: int8."""
    whole = codes.view(torch.int8) if codes.is_contiguous() else codes.contiguous().view(torch.int8)
    sign = (whole & 1).mul_(-2).add_(1)
    return (codes >> 1).view(torch.int8).mul_(sign), sign


def _levels(codes: Tensor, levels: Tensor, out: Tensor) -> Tensor:
    """The level that each code names, with its sign."""
    low, high = levels.split(1, dim=1)
    upper, sign = _signed(codes)
    torch.mul(upper.to(out.dtype), high, out=out)
    return out.addcmul_(sign.sub_(upper).to(out.dtype), low)  # one of both is 0


def _newton(x: Tensor) -> Tensor:
    """`1 / x` of positive normal float32, near enough, as the kernels come to it."""
    r = (0x7EF311C3 - x.view(torch.int32)).view(torch.float32)
    for _ in range(3):
        r = r * (2.0 - x * r)
    return r


def _two_levels(magnitudes: Tensor, most: Tensor) -> Tensor:
    """Lower and upper level of each row `[n, 2]`, as `kernels.quantise` defines them."""
    k = magnitudes.shape[1]
    if magnitudes.dtype == torch.float64:
        return _plain_levels(magnitudes)
    exponent = torch.frexp(most).exponent.clamp_(min=_LEAST_EXPONENT)
    scale = torch.ldexp(torch.ones_like(most), 24 - exponent)
    # A sum of these tells, of as many as there are, the sum of `q` and below it their number.
    bits = k.bit_length()
    assert 24 + 2 * bits < 63, f"{k} values"
    # Float64 holds them up to 2^53, and is converted to five times as fast without AVX-512.
    wide = torch.float64 if 24 + 2 * bits <= 53 else torch.int64
    like = magnitudes.new_empty(0, dtype=wide)
    numbered, blocks = scratch(SUMS, tuple(magnitudes.shape), like), _blocks(magnitudes)
    for rows in blocks:
        own = magnitudes[rows]
        whole = torch.mul(own, scale[rows], out=scratch(COUNTS, tuple(own.shape), own)).floor_()
        numbered[rows].copy_(whole).mul_(1 << bits).add_(1)
    sums = numbered.sum(1, keepdim=True)
    total = sums.to(torch.int64) >> bits
    reciprocals = _reciprocals(k, magnitudes.device)
    levels = (total.to(torch.float32) * reciprocals[0]).expand(-1, 2)
    for _ in range(LLOYD):
        # The least whole number above the middle; in place of what is below it, it adds up too.
        least = levels.sum(1, keepdim=True).mul_(0.5).floor_().to(torch.int64).add_(1)
        numbers = (least << bits).to(wide)
        for rows in blocks:
            own = numbered[rows]
            larger = torch.clamp(own, min=numbers[rows], out=scratch(COUNTS, tuple(own.shape), own))
            torch.sum(larger, 1, keepdim=True, out=sums[rows])
        found = sums.to(torch.int64)
        count = (found & ((1 << bits) - 1)).clamp_(max=k)  # where there are NaN it is anything
        below = k - count
        upper = (found >> bits).sub_(least.mul_(below))
        both = torch.cat([total - upper, upper], dim=1)
        counts = torch.cat([below, count], dim=1)
        both = torch.where(counts > 0, both, total).to(torch.float32)
        levels = both * reciprocals.take(counts)
    return torch.where(most.isfinite(), levels / scale, torch.nan)  # receivers refuse it


@cache
def _reciprocals(k: int, device: torch.device) -> Tensor:
    """`_newton` of 1 to k, and in place of that of 0 that of k: float32 `[k + 1]`."""
    counts = torch.arange(k + 1, dtype=torch.float32, device=device)
    counts[0] = k
    return _newton(counts)


def _plain_levels(magnitudes: Tensor) -> Tensor:
    """The same in float64, which no kernel has."""
    k = magnitudes.shape[1]
    total = magnitudes.sum(1, keepdim=True)
    low = high = total / k
    for _ in range(LLOYD):
        above = (magnitudes > (low + high) / 2).to(magnitudes.dtype)
        count, upper = above.sum(1, keepdim=True), above.mul_(magnitudes).sum(1, keepdim=True)
        high = torch.where(count > 0, upper / count.clamp(min=1), low)
        low = torch.where(count < k, (total - upper) / (k - count).clamp(min=1), high)
    return torch.cat([low, high], dim=1)
