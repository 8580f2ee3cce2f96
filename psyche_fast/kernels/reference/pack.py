"""The wire code in plain PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from psyche_fast.kernels.pack import IndexCode

_LOWEST_BITS = 0x0101010101010101  # of eight bytes at once
_ELEMENTS_AT_ONCE = 1 << 21


def pack(
    code: IndexCode, indices: Tensor, signs: Tensor | None, planes: Tensor, count: int
) -> None:
    """Write bit planes.

    Args:
        code: how indices are written.
        indices: unsigned `[chunks, k]`, ascending.
        signs: `[chunks, k]`, bool, floating point or codes in uint8; None to leave them out.
        planes: uint8 `[groups, bits]`, written.
        count: bits of a code, 1 for signs.
    """
    chunks, k = indices.shape
    groups = len(planes)
    if signs is not None:
        codes = signs if signs.dtype == torch.uint8 else _signs(signs)
        _pack_codes(codes, planes[:, code.bits :], count)
    if code.bits == 0:
        return
    index = indices.to(torch.int64)
    shifts = torch.arange(code.low, device=index.device)
    low = ((index.unsqueeze(2) >> shifts) & 1).view(chunks, -1).to(torch.uint8)
    position = (index >> code.low) + code.gap * torch.arange(k, device=index.device)
    upper = torch.zeros(chunks, code.upper, dtype=torch.uint8, device=index.device)
    bits = torch.cat([low, upper.scatter_(1, position, 1)], dim=1)
    bits = torch.nn.functional.pad(bits, (0, 0, 0, groups * 8 - chunks)).view(groups, 8, -1)
    joined = bits[:, 0].clone()
    for place in range(1, 8):
        joined += bits[:, place] << place
    planes[:, : code.bits] = joined


def _signs(values: Tensor) -> Tensor:
    """1 for negative, uint8; a comparison into floating point is faster than one into bool."""
    if values.dtype == torch.bool:
        return values.view(torch.uint8)
    return torch.lt(values, 0, out=torch.empty_like(values)).to(torch.int8).view(torch.uint8)


def _pack_codes(codes: Tensor, planes: Tensor, count: int) -> None:
    """Bits of codes `[chunks, k]` into `[groups, count * k]`, eight codes of a chunk at once."""
    k, whole = codes.shape[1], len(codes) // 8 * 8
    at_once = _rows_at_once(k)
    for first in range(0, len(codes), at_once):
        part = codes[first : first + at_once]
        if first + len(part) > whole or k % 8 or not part.is_contiguous():
            part = torch.nn.functional.pad(part, (0, -k % 8, 0, -len(part) % 8))
        words = part.view(torch.int64).view(len(part) // 8, 8, -1)
        target = planes[first // 8 : first // 8 + len(words)].unflatten(1, (count, k))
        for plane in range(count):
            joined: Tensor | None = None
            for place in range(8):
                shift, mask = place - plane, _as_signed(_LOWEST_BITS << place)
                word = words[:, place]
                moved = word << shift if shift >= 0 else word >> -shift
                moved = moved.bitwise_and_(mask) if shift else word & mask
                joined = moved if joined is None else joined.bitwise_or_(moved)
            assert joined is not None
            target[:, plane] = joined.view(torch.uint8)[:, :k]


def _unpack_codes(planes: Tensor, codes: Tensor, count: int) -> None:
    """What `_pack_codes` wrote, of peers `[peers, groups, count * k]`, to `[chunks, peers, k]`."""
    chunks, peers, k = codes.shape
    at_once = _rows_at_once(k)
    for peer in range(peers):
        for first in range(0, chunks, at_once):
            part = planes[peer, first // 8 : (first + at_once) // 8]
            part = part.unflatten(1, (count, k))
            if k % 8 or part.storage_offset() % 8 or part.stride(0) % 8:
                part = torch.nn.functional.pad(part, (0, -k % 8)).contiguous()
                if part.data_ptr() % 8:
                    part = part.clone()
            words = part.view(torch.int64)
            found = words.new_empty(len(words), 8, words.shape[2])
            for place in range(8):
                for plane in range(count):
                    shift = plane - place
                    word = words[:, plane]
                    moved = word << shift if shift >= 0 else word >> -shift
                    mask = _as_signed(_LOWEST_BITS << plane)
                    moved = moved.bitwise_and_(mask) if shift else word & mask
                    if plane == 0:
                        found[:, place] = moved
                    else:
                        found[:, place] |= moved
            bytes_ = found.view(len(words) * 8, -1).view(torch.uint8)
            target = codes[first : first + at_once, peer]
            target.copy_(bytes_[: len(target), :k])


def _rows_at_once(k: int) -> int:
    """Rows of `k` that are worked on together, a multiple of 8."""
    return max(8, _ELEMENTS_AT_ONCE // max(k, 1) // 8 * 8)


def _as_signed(mask: int) -> int:
    """The int64 of the same bits."""
    return mask - (1 << 64) if mask >> 63 else mask


def unpack(
    code: IndexCode,
    planes: Tensor,
    indices: Tensor,
    signs: Tensor | None,
    valid: Tensor | None,
    count: int,
) -> None:
    """Read bit planes of any content.

    Args:
        code: how indices are written.
        planes: uint8 `[peers, groups, bits]`.
        indices: unsigned `[chunks, peers, k]`, written where the code has bits: entries that the
            bit vector does not name become 0, what is out of range the last index.
        signs: bool or uint8 `[chunks, peers, k]`, written; None where there are none.
        valid: bool `[peers, chunks]`; set to False where the indices are not well-formed.
        count: bits of a code, 1 for signs.
    """
    chunks, peers, k = indices.shape
    low_bits = k * code.low
    if signs is not None:
        _unpack_codes(planes[..., code.bits :], signs.view(torch.uint8), count)
    if code.bits == 0:
        return
    shifts = torch.arange(8, dtype=torch.uint8, device=planes.device).view(1, 1, 8, 1)
    planes = planes[..., : code.bits]
    bits = ((planes.unsqueeze(2) >> shifts) & 1).view(peers, -1, planes.shape[2])[:, :chunks]
    low = bits[..., :low_bits].reshape(peers, chunks, k, code.low)
    # Products are exact below 2^24, and faster than shifts of int64.
    wide = torch.float32 if code.low <= 24 else torch.float64
    powers = 2.0 ** torch.arange(code.low, dtype=wide, device=low.device)
    low = (low.to(wide) @ powers).to(torch.int64)
    upper = bits[..., low_bits : code.bits].to(torch.int64)
    # The i-th set bit goes to position i; those beyond the k-th to a position that is cut off.
    rank = (upper.cumsum(2) - (k + 1)).clamp_(max=0).mul_(upper).add_(k)
    high = low.new_zeros(peers, chunks, k + 1)
    positions = torch.arange(code.upper, device=low.device).expand_as(upper)
    high.scatter_(2, rank, positions)
    high = high[..., :k]
    entry = torch.arange(k, device=low.device)
    count_set = upper.sum(2)
    named = entry < count_set.unsqueeze(2)
    index = ((high - code.gap * entry) << code.low) | low
    index = torch.where(named, index, 0)
    if valid is not None:
        ascending = (index[..., 1:] > index[..., :-1]).all(2)
        valid &= (count_set == k) & ascending & (index < code.totalk).all(2)
    index.clamp_(max=code.totalk - 1)
    indices.copy_(index.transpose(0, 1))
