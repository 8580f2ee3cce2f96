"""The wire code in plain PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from psyche_fast.kernels.pack import IndexCode


def pack(code: IndexCode, indices: Tensor, signs: Tensor | None, planes: Tensor) -> None:
    """Write bit planes.

    Args:
        code: how indices are written.
        indices: unsigned `[chunks, k]`, ascending.
        signs: `[chunks, k]`, bool or floating point; None to leave signs out.
        planes: uint8 `[groups, bits]`, written.
    """
    chunks, k = indices.shape
    parts = []
    if code.bits:
        index = indices.to(torch.int64)
        shifts = torch.arange(code.low, device=index.device)
        parts.append(((index.unsqueeze(2) >> shifts) & 1).view(chunks, -1).to(torch.uint8))
        position = (index >> code.low) + code.gap * torch.arange(k, device=index.device)
        upper = torch.zeros(chunks, code.upper, dtype=torch.uint8, device=index.device)
        parts.append(upper.scatter_(1, position, 1))
    if signs is not None:
        parts.append((signs if signs.dtype == torch.bool else signs < 0).to(torch.uint8))
    groups = len(planes)
    bits = torch.cat(parts, dim=1)
    bits = torch.nn.functional.pad(bits, (0, 0, 0, groups * 8 - chunks))
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device).view(1, 8, 1)
    torch.sum(bits.view(groups, 8, -1) << shifts, dim=1, dtype=torch.uint8, out=planes)


def unpack(
    code: IndexCode,
    planes: Tensor,
    indices: Tensor,
    signs: Tensor | None,
    valid: Tensor | None,
) -> None:
    """Read bit planes of any content.

    Args:
        code: how indices are written.
        planes: uint8 `[peers, groups, bits]`.
        indices: unsigned `[chunks, peers, k]`, written where the code has bits: entries that the
            bit vector does not name become 0, what is out of range the last index.
        signs: bool `[chunks, peers, k]`, written; None where there are none.
        valid: bool `[peers, chunks]`; set to False where the indices are not well-formed.
    """
    chunks, peers, k = indices.shape
    shifts = torch.arange(8, dtype=torch.uint8, device=planes.device).view(1, 1, 8, 1)
    bits = ((planes.unsqueeze(2) >> shifts) & 1).view(peers, -1, planes.shape[2])[:, :chunks]
    low_bits = k * code.low
    if signs is not None:
        signs.copy_(bits[..., code.bits :].transpose(0, 1))
    if code.bits == 0:
        return
    low = bits[..., :low_bits].reshape(peers, chunks, k, code.low).to(torch.int64)
    low = (low << torch.arange(code.low, device=low.device)).sum(3)
    upper = bits[..., low_bits : code.bits].to(torch.int64)
    # The i-th set bit goes to position i; those beyond the k-th to a position that is cut off.
    rank = (upper.cumsum(2) - 1).clamp_(max=k)
    rank.masked_fill_(upper == 0, k)
    high = low.new_zeros(peers, chunks, k + 1)
    positions = torch.arange(code.upper, device=low.device).expand_as(upper)
    high.scatter_(2, rank, positions)
    high = high[..., :k]
    entry = torch.arange(k, device=low.device)
    count = upper.sum(2)
    named = entry < count.unsqueeze(2)
    index = ((high - code.gap * entry) << code.low) | low
    index = torch.where(named, index, 0)
    if valid is not None:
        ascending = (index[..., 1:] > index[..., :-1]).all(2)
        valid &= (count == k) & ascending & (index < code.totalk).all(2)
    index.clamp_(max=code.totalk - 1)
    indices.copy_(index.transpose(0, 1))
