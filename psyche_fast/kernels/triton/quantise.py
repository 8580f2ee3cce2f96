"""Blockwise quantisation, and its kernels: of selected values, and of all in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from psyche_fast.kernels.plan import ChunkPlan, Rates
from psyche_fast.kernels.quantise import Bits, Codes, scales_like
from psyche_fast.kernels.triton.arithmetic import nearest, power_of_two
from psyche_fast.kernels.triton.launch import (
    TILE_ELEMENTS,
    launch_options,
    on_device,
    padded,
    planned,
    programs,
    rates,
    uniform,
    written,
)
from psyche_fast.kernels.triton.plain import take_up


@triton.jit
def newton(x):
    """`1 / x` of positive normal float32, near enough, by operations that IEEE defines."""
    r = (0x7EF311C3 - x.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    for _ in tl.static_range(3):
        r = r * (2.0 - x * r)
    return r


@triton.jit
def quotient(x, N: tl.constexpr):
    """`x / N` of normal float32 and a whole number up to 7 bits, as IEEE rounds it."""
    q = x * (1.0 / N)
    high = (q.to(tl.int32, bitcast=True) & (-4096)).to(tl.float32, bitcast=True)
    rest = (x - high * N) - (q - high) * N  # exact
    return q + rest * (1.0 / N)


@triton.jit
def exact_sum(q):
    """Of rows of up to 4096 integers of 24 bits, int64."""
    return tl.sum(q >> 12, 1).to(tl.int64) * 4096 + tl.sum(q & 4095, 1)


@triton.jit
def mean_of(sums, count, total, K: tl.constexpr):
    """`sums / count` of integers, or of all `K` where there are none."""
    some = count > 0
    sums = tl.where(some, sums, total).to(tl.float32)
    return sums * newton(tl.where(some, count, K).to(tl.float32))


@triton.jit
def two_levels(magnitude, most, K: tl.constexpr):
    """Lower and upper level of rows `[R, N]`, zeros beyond their `K`, bfloat16 `[R]`.

    Args:
        magnitude: float32.
        most: the largest of each row, `[R]`.
    """
    # Exponents from -100 on: the largest lies below 2 to the power.
    exponent = tl.maximum(most.to(tl.int32, bitcast=True) >> 23, 26) - 126
    q = (magnitude * power_of_two(24 - exponent)[:, None]).to(tl.int32)
    total = exact_sum(q)
    low = mean_of(total, tl.full(most.shape, K, tl.int32), total, K)
    high = low
    for _ in range(8):
        threshold = ((low + high) * 0.5).to(tl.int32)  # rounds down
        above = q > threshold[:, None]
        count = tl.sum(above.to(tl.int32), 1)
        upper = exact_sum(tl.where(above, q, 0))
        low = mean_of(total - upper, K - count, total, K)
        high = mean_of(upper, count, total, K)
    unit = power_of_two(exponent - 24)
    return (low * unit).to(tl.bfloat16), (high * unit).to(tl.bfloat16)


@triton.jit
def quantised(x, chunk, live, scales, K: tl.constexpr, BITS: tl.constexpr):
    """Codes of values `[R, N]`, zeros beyond their `K`, and what they say; stores the scales."""
    magnitude = tl.abs(x)
    most = tl.max(magnitude, 1)
    if BITS == 2:
        low, high = two_levels(magnitude, most, K)
        tl.store(scales + 2 * chunk.to(tl.int64), low, mask=live)
        tl.store(scales + 2 * chunk.to(tl.int64) + 1, high, mask=live)
        low = low.to(tl.float32)[:, None]
        high = high.to(tl.float32)[:, None]
        is_high = magnitude > low * 0.5 + high * 0.5
        negative = x < 0
        level = tl.where(is_high, high, low)
        y = tl.where(negative, -level, level)
        code = is_high.to(tl.int32) * 2 + negative.to(tl.int32)
    else:
        LIMIT: tl.constexpr = (1 << (BITS - 1)) - 1
        scale = tl.where(most >= 2.0**-100, quotient(most, LIMIT), 0.0)
        tl.store(scales + chunk.to(tl.int64), scale, mask=live)
        inverse = tl.where(scale > 0, newton(tl.maximum(scale, 2.0**-108)), 0.0)
        n = nearest(x * inverse[:, None], 1.0)
        n = tl.minimum(tl.maximum(n, -LIMIT), LIMIT)
        y = n * scale[:, None]
        code = tl.abs(n).to(tl.int32) * 2 + (n < 0).to(tl.int32)
    return code.to(tl.uint8), y


@triton.jit
def said(code, low, high, BITS: tl.constexpr):
    """Values of codes `[R, N]` with scales `[R, 1]`: two levels, or one in `low`."""
    code = code.to(tl.int32)
    if BITS == 2:
        size = tl.where(code > 1, high, low)
    else:
        size = (code >> 1).to(tl.float32) * low
    return tl.where((code & 1) != 0, -size, size)


@triton.jit(do_not_specialize=["chunks"])
def quantise_entries(
    values, codes, scales, seen, chunks,
    K: tl.constexpr, KP: tl.constexpr, R: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Codes, scales and `seen` of values `[chunks, K]`, float32."""
    e = tl.arange(0, KP)[None, :]
    chunk = tl.program_id(0) * R + tl.arange(0, R)
    live = chunk < chunks
    inside = live[:, None] & (e < K)
    at = chunk.to(tl.int64)[:, None] * K + e
    x = tl.load(values + at, mask=inside, other=0.0)
    code, y = quantised(x, chunk, live, scales, K, BITS)
    tl.store(codes + at, code, mask=inside)
    tl.store(seen + at, y, mask=inside)


@triton.jit(do_not_specialize=["chunks"])
def dequantise_entries(
    codes, scales, values, chunks,
    K: tl.constexpr, KP: tl.constexpr, R: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Values `[chunks, K]` of codes; the chunks of all peers."""
    e = tl.arange(0, KP)[None, :]
    chunk = tl.program_id(0) * R + tl.arange(0, R)
    live = chunk < chunks
    inside = live[:, None] & (e < K)
    at = chunk.to(tl.int64)[:, None] * K + e
    step: tl.constexpr = 2 if BITS == 2 else 1
    first = scales + chunk.to(tl.int64) * step
    low = tl.load(first, mask=live, other=0.0).to(tl.float32)
    high = tl.load(first + step - 1, mask=live, other=0.0).to(tl.float32)
    code = tl.load(codes + at, mask=inside, other=0)
    tl.store(values + at, said(code, low[:, None], high[:, None], BITS), mask=inside)


@triton.jit(do_not_specialize=["chunks", "rate_step"])
def encode_everything(
    members, table, anchors, anchor_table, delta, out, scales, rates, scale, decay, share, chunks,
    rate_step,
    BITS: tl.constexpr, KEPT: tl.constexpr, TAKEN: tl.constexpr, R: tl.constexpr, L: tl.constexpr,
    N: tl.constexpr, w: tl.constexpr, GRADIENT: tl.constexpr, ANCHOR: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """As `encode_plain`, of all values.

    Args:
        out: `[chunks, L]`: codes, or with 0 BITS the values in their dtype.
        scales: of the chunks, with BITS.
        share: of what is sent that is taken out of the state.
        KEPT: whether there is a state.
        TAKEN: 0 nothing is taken out of it, 1 what receivers see, 2 the values themselves.
    """
    e = tl.arange(0, N)[None, :]
    for first in range(tl.program_id(0) * R, chunks, tl.num_programs(0) * R):
        chunk = first + tl.arange(0, R)
        live = chunk < chunks
        inside = live[:, None] & (e < L)
        at = chunk.to(tl.int64)[:, None] * L + e
        x = take_up(
            members, table, anchors, anchor_table, delta, rates, scale, decay, chunk, live, e,
            rate_step, L, w, GRADIENT, ANCHOR, KEPT, ALIGNED,
        )  # fmt: skip
        if BITS > 0:
            sent, y = quantised(x, chunk, live, scales, L, BITS)
        else:
            sent = x.to(out.dtype.element_ty)
            y = sent.to(tl.float32)
        tl.store(out + at, sent, mask=inside)
        if KEPT:
            if TAKEN == 1:
                x = tl.fma(y, -share, x)
            elif TAKEN == 2:
                x = tl.fma(x, -share, x)
            tl.store(delta + at, x, mask=inside)


def quantise(plan: ChunkPlan, values: Tensor, bits: Bits) -> tuple[Codes, Tensor]:
    """See `psyche_fast.kernels.quantise.quantise`."""
    values = values.contiguous()
    codes, seen = _empty(values.shape, values.device, bits), torch.empty_like(values)
    _entries(quantise_entries, values, codes.codes, codes.scales, seen, bits=bits, like=values)
    return codes, seen


def dequantise(plan: ChunkPlan, codes: Codes, bits: Bits) -> Tensor:
    """See `psyche_fast.kernels.quantise.dequantise`."""
    code, scales = codes.codes.contiguous(), codes.scales.contiguous()
    values = torch.empty(code.shape, dtype=torch.float32, device=code.device)
    _entries(dequantise_entries, code, scales, values, bits=bits, like=values)
    return values


def _entries(kernel: object, *tensors: Tensor, bits: Bits, like: Tensor) -> None:
    """Launch a kernel over the rows `[.., K]` of a tensor."""
    k = like.shape[-1]
    if like.numel() == 0:
        return
    rows, device, (width, together) = like.numel() // k, like.device, entry_tile(k)
    options, _ = launch_options("plain", device)
    with on_device(device):
        kernel[(triton.cdiv(rows, together),)](  # type: ignore[index]
            *tensors, rows, K=k, KP=width, R=together, BITS=bits, **options
        )
    written(*tensors[1:])


def entry_tile(k: int) -> tuple[int, int]:
    """Width of the rows of `k` entries, and how many one program has."""
    width = max(2, triton.next_power_of_2(k))
    return width, max(1, TILE_ELEMENTS // 2 // width)


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
    device = plan.device
    codes = None
    if bits is not None:
        codes = _empty(torch.Size((plan.chunks, plan.totalk)), device, bits)
        out = codes.codes
    if plan.chunks == 0:
        return codes
    assert out is not None
    ready = planned(plan)
    gradients = uniform(gradients)
    sources = ready.members(gradients, "gradient")
    fixed = sources if anchors is None else ready.members(anchors, "anchor")
    rate, rate_step = rates(learning_rates, device)
    scale = gradient_scale
    if not isinstance(scale, Tensor):
        scale, _ = rates([1.0 if scale is None else scale], device)
    options, own = launch_options("plain", device)
    together = ready.rows_per_tile
    grid = (programs(device, own["ctas_per_sm"], triton.cdiv(plan.chunks, together)),)
    with on_device(device):
        encode_everything[grid](
            sources.addresses, sources.table, fixed.addresses, fixed.table,
            rate if delta is None else delta, out, rate if codes is None else codes.scales, rate,
            scale, decay, share, plan.chunks, rate_step, BITS=bits or 0, KEPT=delta is not None,
            TAKEN=0 if share == 0.0 else 2 if exact else 1, R=together, L=ready.length,
            N=padded(ready.length), w=plan.w, GRADIENT=sources.dtype, ANCHOR=anchors is not None,
            ALIGNED=sources.aligned and fixed.aligned, **options,
        )  # fmt: skip
    written(delta, out, None if codes is None else codes.scales)
    return codes


def _empty(shape: torch.Size, device: torch.device, bits: Bits) -> Codes:
    dtype, count = scales_like(bits)
    return Codes(
        torch.empty(shape, dtype=torch.uint8, device=device),
        torch.empty(*shape[:-1], count, dtype=dtype, device=device),
    )
