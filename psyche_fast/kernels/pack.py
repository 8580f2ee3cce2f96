"""Results of a chunk class as bytes: a fixed number of bits per chunk, near the entropy floor.

The `k` ascending indices of a chunk are written in Elias and Fano's code (Elias, "Efficient storage
and retrieval by content and address of static files", J. ACM 21, 1974): the low `l` bits of each as
they are, what is left of the i-th as bit `(index >> l) + i` of a bit vector. `l` is what gives the
fewest bits; where a plain bit per coefficient is shorter, that is used, and where all coefficients
are kept, nothing. A chunk of 64 x 64 takes 51, 95 and 319 bits for 4, 8 and 32 entries with their
signs; the floor, `log2(binomial(4096, k)) + k`, is 47.4, 88.7 and 298.

Bytes hold one bit of eight chunks each, so that no chunk is padded. Layout, without a header:

1. values, unless only signs are sent: `[chunks, k]` in their dtype, little-endian;
2. bit planes, uint8 `[ceil(chunks / 8), bits]`: bit `j` of byte `[g, b]` is bit `b` of chunk
   `8 g + j`. A chunk's bits are the low bits (entry by entry, least significant first), the bit
   vector, and a sign per entry (1 for negative) where only signs are sent; of codes of several bits
   the lowest bit per entry, then the next one of all entries, and so on.

Codes of all coefficients, of 2, 4 or 8 bits, are cut into 4, 2 or 1 runs of the same length, the
last one filled up with zeros: byte `i` has the `i`-th code of every run, the first run's in its
lowest bits.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal, TypeGuard

import torch
from torch import Tensor

from psyche_fast.kernels.backends import implementation
from psyche_fast.kernels.plan import ChunkPlan, Entries

Values = Literal["sign"] | int | torch.dtype
"""What is sent of a value: its sign, a code of so many bits (up to 8), or all of it in a
floating-point dtype."""

__all__ = [
    "IndexCode", "Values", "all_codes", "are_finite", "index_code", "numbers", "pack", "size",
    "squares", "unpack", "unpack_checked", "well_formed",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class IndexCode:
    """How the indices of one chunk are written.

    Attributes:
        totalk: coefficients of a chunk; indices are below it.
        k: entries.
        low: bits of each index that are written as they are.
        gap: 1 where bit `(index >> low) + i` stands for the i-th index (Elias-Fano), 0 where bit
            `index` does (a bit per coefficient).
        upper: length of the bit vector.
    """

    totalk: int
    k: int
    low: int
    gap: int
    upper: int

    @property
    def bits(self) -> int:
        """Bits of a chunk's indices."""
        return self.k * self.low + self.upper


@functools.cache
def index_code(totalk: int, k: int) -> IndexCode:
    """The shortest code for `k` of `totalk` indices, `1 <= k <= totalk <= 2^30`."""
    assert 1 <= k <= totalk <= 1 << 30
    if k == totalk:
        return IndexCode(totalk, k, low=0, gap=0, upper=0)
    codes = [IndexCode(totalk, k, low=0, gap=0, upper=totalk)]
    for low in range(totalk.bit_length()):
        codes.append(IndexCode(totalk, k, low, gap=1, upper=k + ((totalk - 1) >> low)))
    # Of equally short ones the one with the shortest bit vector, which is the least work to read.
    return min(codes, key=lambda code: (code.bits, code.upper))


def size(plan: ChunkPlan, values: Values) -> int:
    """Bytes of one peer's result for a chunk class.

    Args:
        plan: the chunk class.
        values: "sign", or the dtype in which values are sent.

    Raises:
        TypeError: `values` is neither.
    """
    if _is_of_all(values, plan):
        return -(-plan.chunks * plan.k * values // 8)
    return _value_bytes(plan, values) + _groups(plan) * _bits(plan, values)


def pack(
    plan: ChunkPlan,
    entries: Entries,
    values: Values,
    *,
    out: Tensor | None = None,
    backend: str = "torch",
) -> Tensor:
    """Encode one peer's entries.

    Args:
        plan: the chunk class.
        entries: `plan.k` entries per chunk, their indices ascending without repetition, as `encode`
            gives them.
        values: "sign" (values below zero, or bool values that are True, are negative), the bits of
            the codes that the values then are (uint8), or the dtype in which values are sent.
        out: where to write, uint8 `[size(plan, values)]`, contiguous; where None it is new memory,
            or the values' own where that is all.
        backend: resolved backend name.

    Returns:
        `out`.

    Raises:
        TypeError: `values` is neither, or the entries hold only signs where more is to be sent.
        ValueError: entries or `out` of another shape, dtype or device.
    """
    _check_entries(plan, entries)
    total = size(plan, values)
    if out is None and isinstance(values, torch.dtype) and plan.k == plan.totalk:
        return _bytes(entries, values)
    if out is None and _is_of_all(values, plan):
        return _joined(entries.values, values)
    if out is None:
        out = torch.empty(total, dtype=torch.uint8, device=plan.device)
    elif out.shape != (total,) or out.dtype != torch.uint8 or not out.is_contiguous():
        raise ValueError(
            f"out: wanted contiguous uint8 [{total}], got {out.dtype} {list(out.shape)}"
        )
    elif out.device != plan.device:
        raise ValueError(f"out: wanted a tensor on {plan.device}, got {out.device}")
    if total == 0:
        return out
    if _is_of_all(values, plan):
        return out.copy_(_joined(entries.values, values))
    value_bytes = _value_bytes(plan, values)
    if isinstance(values, torch.dtype):
        if entries.values.dtype == torch.bool:
            raise TypeError(f"entries: wanted values to be sent in {values}, got signs alone")
        # As bytes: `out` need not be aligned as the values are. A single value may have any stride.
        raw = entries.values.to(values).reshape(-1).contiguous().view(-1).view(torch.uint8)
        out[:value_bytes].copy_(raw)
    bits = _bits(plan, values)
    if bits:
        planes = out[value_bytes:].view(_groups(plan), bits)
        signs = None if isinstance(values, torch.dtype) else entries.values
        implementation(backend, "pack").pack(
            index_code(plan.totalk, plan.k), entries.indices, signs, planes, _planes(values)
        )
    return out


def _bytes(entries: Entries, values: torch.dtype) -> Tensor:
    """Values in the dtype in which they are sent, uint8."""
    if entries.values.dtype == torch.bool:
        raise TypeError(f"entries: wanted values to be sent in {values}, got signs alone")
    return entries.values.to(values).contiguous().view(-1).view(torch.uint8)


def unpack(plan: ChunkPlan, data: Tensor, values: Values, *, backend: str = "torch") -> Entries:
    """Decode results, of one peer or of several side by side.

    Whatever the bytes, the indices are in range; use `unpack_checked` for bytes that nobody vouches
    for.

    Args:
        plan: the chunk class.
        data: uint8 `[size]` of one peer or `[peers, size]`, rows contiguous.
        values: what `pack` was told.
        backend: resolved backend name.

    Returns:
        Indices in `plan.index_dtype` and values (bool for "sign", uint8 for codes), `[chunks,
        peers * k]` with the peers in the order of the rows. `unique` for a single peer.

    Raises:
        TypeError: `values` is neither "sign" nor a floating-point dtype.
        ValueError: `data` of another shape, dtype or device.
    """
    return _unpack(plan, data, values, backend, check=False)[0]


def unpack_checked(
    plan: ChunkPlan, data: Tensor, values: Values, *, backend: str = "torch"
) -> tuple[Entries, Tensor]:
    """Decode results as `unpack` does, and say which chunks are well-formed.

    Returns:
        The entries, and bool `[chunks]`, or `[peers, chunks]` for several peers: the bit vector
        names exactly `k` entries, indices ascend strictly and are in range, values are finite.
    """
    entries, valid = _unpack(plan, data, values, backend, check=True)
    assert valid is not None
    return entries, valid


_CHUNKS_AT_ONCE = 1 << 12


def well_formed(plan: ChunkPlan, data: Tensor, values: Values) -> Tensor:
    """Which peers' results are well-formed, as `unpack_checked` says of each chunk.

    In slices that stay in the processor's cache, and nothing is kept: for a host that only looks.

    Args:
        plan: the chunk class, of any device.
        data: uint8 `[peers, size]` in host memory, rows contiguous.
        values: what `pack` was told.

    Returns:
        bool `[peers]`.
    """
    code, at = index_code(plan.totalk, plan.k), _value_bytes(plan, values)
    good = torch.ones(len(data), dtype=torch.bool)
    if isinstance(values, torch.dtype):
        good &= numbers(plan, data, values).isfinite().all(dim=1)
    if code.bits == 0:
        return good
    planes = data[:, at:].unflatten(1, (_groups(plan), _bits(plan, values)))
    for group, part in enumerate(planes.split(_CHUNKS_AT_ONCE // 8, dim=1)):
        chunks = min(plan.chunks - group * _CHUNKS_AT_ONCE, _CHUNKS_AT_ONCE)
        indices = torch.empty(chunks, len(data), plan.k, dtype=plan.index_dtype)
        valid = torch.ones(len(data), chunks, dtype=torch.bool)
        implementation("torch", "pack").unpack(code, part, indices, None, valid, 0)
        good &= valid.all(dim=1)
    return good


def squares(plan: ChunkPlan, data: Tensor, values: Values) -> Tensor:
    """Sums of the squares of peers' values: float64 `[peers]`.

    Args:
        plan: the chunk class, of any device.
        data: uint8 `[peers, size]` in host memory, rows contiguous.
        values: the dtype in which they are sent.
    """
    assert isinstance(values, torch.dtype), "signs have no norm"
    return numbers(plan, data, values).double().square().sum(dim=1)


def numbers(plan: ChunkPlan, data: Tensor, values: torch.dtype) -> Tensor:
    """The values of each peer, `[peers, chunks * k]`: a view where the bytes are aligned."""
    raw = data[:, : _value_bytes(plan, values)]
    if raw.numel() == 0:
        return raw.new_empty(len(data), plan.chunks * plan.k, dtype=values)
    steps = (raw.data_ptr(), raw.storage_offset(), raw.stride(0))
    if any(step % values.itemsize for step in steps):
        raw = raw.clone(memory_format=torch.contiguous_format)
    return raw.view(values)


def are_finite(values: Tensor) -> Tensor:
    """Whether all numbers of the last dimension are; NaN is the largest and the smallest."""
    if values.numel() == 0:
        return torch.ones(values.shape[:-1], dtype=torch.bool, device=values.device)
    if values.device.type == "cpu":  # one pass: a finite sum has finite terms
        is_finite = values.sum(-1).isfinite()
        if bool(is_finite.all()):
            return is_finite
    return (values.amax(-1) < math.inf) & (values.amin(-1) > -math.inf)


def _unpack(
    plan: ChunkPlan, data: Tensor, values: Values, backend: str, *, check: bool
) -> tuple[Entries, Tensor | None]:
    total = size(plan, values)
    rows = data if data.dim() == 2 else data.unsqueeze(0)
    if rows.dim() != 2 or rows.shape[1] != total or rows.dtype != torch.uint8:
        raise ValueError(
            f"data: wanted uint8 [{total}] or [peers, {total}], got {data.dtype} {list(data.shape)}"
        )
    if rows.stride(1) != 1 and total > 1:
        raise ValueError(f"data: wanted contiguous rows, got strides {data.stride()}")
    if rows.device != plan.device:
        raise ValueError(f"data: wanted a tensor on {plan.device}, got {data.device}")
    peers, chunks, k = len(rows), plan.chunks, plan.k
    code = index_code(plan.totalk, k)
    shape = (chunks, peers, k)
    indices = torch.empty(shape, dtype=plan.index_dtype, device=rows.device)
    valid = torch.ones(peers, chunks, dtype=torch.bool, device=rows.device) if check else None
    value_bytes = _value_bytes(plan, values)
    if isinstance(values, torch.dtype):
        found = numbers(plan, rows, values).view(peers, chunks, k)
        if valid is not None:
            valid &= are_finite(found)
        result, signs = found.transpose(0, 1), None
    elif _is_of_all(values, plan):
        result, signs = all_codes(plan, rows, values).transpose(0, 1), None
    else:
        dtype = torch.bool if values == "sign" else torch.uint8
        result = signs = torch.empty(shape, dtype=dtype, device=rows.device)
    if code.bits == 0:
        everything = torch.arange(k, device=rows.device)
        indices.copy_(everything.to(plan.index_dtype).expand(shape))
    bits = _bits(plan, values)
    if (code.bits or signs is not None) and chunks and peers:
        planes = rows[:, value_bytes:].unflatten(1, (_groups(plan), bits))
        implementation(backend, "pack").unpack(code, planes, indices, signs, valid, _planes(values))
    entries = Entries(
        indices.view(chunks, peers * k), result.reshape(chunks, peers * k), unique=peers == 1
    )
    return entries, (valid if valid is None or data.dim() == 2 else valid[0])


def _check_entries(plan: ChunkPlan, entries: Entries) -> None:
    wanted = (plan.chunks, plan.k)
    for name, tensor in (("indices", entries.indices), ("values", entries.values)):
        if tensor.shape != wanted:
            raise ValueError(f"{name}: wanted shape {list(wanted)}, got {list(tensor.shape)}")
        if tensor.device != plan.device:
            raise ValueError(f"{name}: wanted a tensor on {plan.device}, got {tensor.device}")
    if entries.indices.dtype != plan.index_dtype:
        raise ValueError(f"indices: wanted {plan.index_dtype}, got {entries.indices.dtype}")


def all_codes(plan: ChunkPlan, data: Tensor, bits: int) -> Tensor:
    """The codes of all coefficients, of several peers: uint8 `[peers, chunks, k]`.

    Args:
        plan: the chunk class.
        data: uint8 `[peers, size]`; any bytes are codes.
        bits: of a code: 2, 4 or 8.
    """
    peers, length = data.shape
    count = plan.chunks * plan.k
    if bits == 8:
        return data.reshape(peers, plan.chunks, plan.k)
    runs = 8 // bits
    codes = torch.empty(peers, runs, length, dtype=torch.uint8, device=data.device)
    for at, run in enumerate(codes.unbind(1)):
        torch.bitwise_right_shift(data, bits * at, out=run)
        if at + 1 < runs:
            run.bitwise_and_((1 << bits) - 1)
    return codes.view(peers, -1)[:, :count].reshape(peers, plan.chunks, plan.k)


def _joined(codes: Tensor, bits: int) -> Tensor:
    """The bytes of codes of all coefficients."""
    flat, runs = codes.reshape(-1), 8 // bits
    if missing := -len(flat) % runs:
        flat = torch.cat([flat, flat.new_zeros(missing)])
    first, *others = flat.view(runs, -1)
    if not others:
        return first
    joined = first.clone()
    for at, run in enumerate(others, 1):
        joined |= run << (bits * at)
    return joined


def _is_of_all(values: Values, plan: ChunkPlan) -> TypeGuard[int]:
    """Whether it is codes of all coefficients that are sent."""
    return isinstance(values, int) and plan.k == plan.totalk and 8 % values == 0


def _groups(plan: ChunkPlan) -> int:
    return -(-plan.chunks // 8)


def _bits(plan: ChunkPlan, values: Values) -> int:
    return index_code(plan.totalk, plan.k).bits + plan.k * _planes(values)


def _planes(values: Values) -> int:
    """Bits of an entry beside its index."""
    if isinstance(values, int):
        return values
    return 1 if values == "sign" else 0


def _value_bytes(plan: ChunkPlan, values: Values) -> int:
    if values == "sign" or isinstance(values, int):
        return 0
    if isinstance(values, torch.dtype) and values.is_floating_point:
        return plan.chunks * plan.k * values.itemsize
    raise TypeError(f"values: wanted 'sign' or a floating-point dtype, got {values!r}")
