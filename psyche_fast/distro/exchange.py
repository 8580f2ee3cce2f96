"""All-gather of one flat message per rank, asynchronous.

A message costs as much as many KiB (on gloo 150 messages of 4 KiB take 160 times as long as one
of the same bytes), so that whatever peers exchange travels as one, cut only where it is larger than
a bucket. The exchange begins as soon as there is something to send and is waited for where it is
used, so that compute runs meanwhile: on CUDA a process group has a communicator and a stream of
its own, on gloo a thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from psyche_fast.compat import all_gather_single

BUCKET_BYTES = {"cpu": 8 << 20, "cuda": 64 << 20}
"""The most that one rank hands to one collective, by where the bytes lie. Messages of more than a
few MiB gain nothing from being larger on gloo; NCCL has buffers and rings to fill."""


@dataclass(frozen=True)
class Pending:
    """An exchange under way.

    Attributes:
        bytes_sent: size of this rank's contribution; 0 where there is nobody to send it to.
    """

    bytes_sent: int
    _device: torch.device
    _sent: Sequence[Tensor]  # kept alive until the collectives have read them
    _received: Sequence[Tensor]
    _works: Sequence[dist.Work | None]

    def completed(self) -> bool:
        """Whether all messages are there, so that nothing is waited for any more."""
        return all(work is None or work.is_completed() for work in self._works)

    def wait(self) -> Tensor:
        """All peers' messages, `[ranks, n]`, in the order of ranks: the same on every peer.

        Where they lie on a GPU it is the current stream that waits, and over gloo the host, for
        the link but not for the device.
        """
        for work in self._works:
            if work is not None:
                work.wait()
        parts = [part.to(self._device, non_blocking=True) for part in self._received]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def start(message: Tensor, peers: dist.ProcessGroup | None) -> Pending:
    """Begins an exchange.

    Args:
        message: `[n]`, of the same size and type on every peer. Where it lies on a GPU and the
            peers talk over gloo, it goes through host memory and the device is waited for.
        peers: the group to exchange with; None where there is nobody (nothing is sent).
    """
    if peers is None:
        return Pending(0, message.device, [], [message.unsqueeze(0)], [])
    staged = message.cpu() if dist.get_backend(peers) == "gloo" else message
    limit = BUCKET_BYTES[staged.device.type] // message.element_size()
    sent = staged.split(limit)
    ranks = dist.get_world_size(peers)
    # Over gloo for a GPU: only from pinned memory does a copy go there without the host.
    pinned = message.is_cuda and not staged.is_cuda
    received = [part.new_empty((ranks, part.numel()), pin_memory=pinned) for part in sent]
    works = [
        _all_gather(into.view(-1), part, peers) for into, part in zip(received, sent, strict=True)
    ]
    return Pending(message.nbytes, message.device, sent, received, works)


def _all_gather(received: Tensor, sent: Tensor, group: dist.ProcessGroup) -> dist.Work | None:
    """``received [ranks * n]`` from every rank's ``sent [n]``, in rank order."""
    work: dist.Work | None = all_gather_single()(received, sent, group=group, async_op=True)
    return work
