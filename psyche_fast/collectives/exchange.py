"""All-gather of many tensors as one flat buffer, asynchronous.

A message costs as much as many KiB (on gloo 150 messages of 4 KiB take 160 times as long as one
of the same bytes), so that whatever peers exchange travels as one. The exchange begins as soon as
there is something to send and is waited for where it is used, so that compute runs meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

_ALIGNMENT = 8  # bytes: every tensor begins at a multiple of the widest element


@dataclass(frozen=True)
class Pending:
    """An exchange under way.

    Attributes:
        bytes_sent: size of this rank's contribution.
    """

    bytes_sent: int
    _own: list[Tensor]
    _sent: Tensor | None  # kept alive until the collective has read it
    _received: Tensor | None
    _work: dist.Work | None

    def wait(self) -> list[list[Tensor]]:
        """All peers' tensors, in the order of the peers' ranks: the same on every peer."""
        if self._received is None:
            return [self._own]
        if self._work is not None:
            self._work.wait()
        return [_unpack(row, self._own) for row in self._received]


def start(tensors: Sequence[Tensor], peers: dist.ProcessGroup | None) -> Pending:
    """Begins an exchange.

    Args:
        tensors: of the same shapes and types on every peer; they travel on the first one's
            device, bools as bits.
        peers: the group to exchange with; None where there is nobody (nothing is sent).
    """
    own = list(tensors)
    if peers is None or not own:
        return Pending(0, own, None, None, None)
    sent = torch.cat([part for tensor in own for part in _pack(tensor.to(own[0].device))])
    received = sent.new_empty(dist.get_world_size(peers), sent.numel())
    work = all_gather_flat(received.view(-1), sent, peers, async_op=True)
    return Pending(sent.numel(), own, sent, received, work)


def all_gather_flat(
    received: Tensor, sent: Tensor, group: dist.ProcessGroup, *, async_op: bool = False
) -> dist.Work | None:
    """``received [ranks * n]`` from every rank's ``sent [n]``, in rank order."""
    # torch 2.13 renamed it and warns of the old name; 2.11 has only that.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return gather(received, sent, group=group, async_op=async_op)


def _pack(tensor: Tensor) -> list[Tensor]:
    flat = tensor.reshape(-1)
    part = pack_bits(flat) if tensor.dtype == torch.bool else flat.view(torch.uint8)
    return [part, part.new_zeros(-part.numel() % _ALIGNMENT)]


def _unpack(row: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    tensors, at = [], 0
    for own in like:
        bits = own.dtype == torch.bool
        size = -(-own.numel() // 8) if bits else own.nbytes
        part = row[at : at + size]
        flat = unpack_bits(part, own.numel()) if bits else part.view(own.dtype)
        tensors.append(flat.view(own.shape))
        at += size + -size % _ALIGNMENT
    return tensors


def _weights(device: torch.device) -> Tensor:
    return torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=device)


def pack_bits(bits: Tensor) -> Tensor:
    """``[n]`` bool to ``[ceil(n / 8)]`` uint8, the first in the lowest bit."""
    padded = torch.nn.functional.pad(bits.to(torch.uint8), (0, -bits.numel() % 8))
    return (padded.view(-1, 8) * _weights(bits.device)).sum(dim=1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, count: int) -> Tensor:
    """The first ``count`` bits, as bool."""
    return (packed[:, None] & _weights(packed.device)).ne(0).view(-1)[:count]
