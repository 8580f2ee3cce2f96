"""Results as one flat buffer of bytes, so that one collective carries everything."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from psyche_fast.distro.layout import Layout
from psyche_fast.kernels.plan import ChunkPlan, Entries

_ALIGNMENT = (
    8  # bytes; every dtype that is read back from the buffer starts at a multiple of its size
)


class PackedEntries:
    """Places of all chunk classes' entries in a flat uint8 buffer, the same on every rank.

    Attributes:
        nbytes: size of the buffer.
        data_bytes: bytes of indices and values in it, without the padding.
    """

    def __init__(self, layout: Layout) -> None:
        self._plans = layout.plans
        self._spans: list[tuple[tuple[int, int], tuple[int, int]]] = []
        self.nbytes = self.data_bytes = 0
        for plan in layout.plans:
            entries = plan.chunks * plan.k
            self._spans.append(
                (
                    self._place(entries * plan.index_dtype.itemsize),
                    self._place(entries * plan.dtype.itemsize),
                )
            )
        # Peers' buffers lie behind each other: all of them must start aligned.
        self.nbytes += -self.nbytes % _ALIGNMENT

    def _place(self, size: int) -> tuple[int, int]:
        start = self.nbytes + -self.nbytes % _ALIGNMENT
        self.nbytes = start + size
        self.data_bytes += size
        return start, self.nbytes

    def pack(self, entries: Sequence[Entries]) -> Tensor:
        """One rank's entries as `[nbytes]` uint8 on the first class's device."""
        buffer = torch.zeros(self.nbytes, dtype=torch.uint8, device=self._plans[0].device)
        for e, (indices, values) in zip(entries, self._spans, strict=True):
            buffer[slice(*indices)].copy_(e.indices.view(-1).view(torch.uint8))
            buffer[slice(*values)].copy_(e.values.view(-1).view(torch.uint8))
        return buffer

    def unpack(self, buffers: Tensor) -> list[Entries]:
        """Entries of all ranks side by side, in rank order, from `[ranks, nbytes]` uint8."""
        return [
            Entries(
                self._read(plan, buffers, indices, plan.index_dtype),
                self._read(plan, buffers, values, plan.dtype),
            )
            for plan, (indices, values) in zip(self._plans, self._spans, strict=True)
        ]

    def all_gather(
        self, entries: Sequence[Entries], group: dist.ProcessGroup | None, peers: int
    ) -> list[Entries]:
        """Exchange entries between the `peers` ranks of a group in one collective."""
        own = self.pack(entries)
        buffers = torch.empty(peers * self.nbytes, dtype=torch.uint8, device=own.device)
        dist.all_gather_into_tensor(buffers, own, group=group)
        return self.unpack(buffers.view(peers, self.nbytes))

    @staticmethod
    def _read(
        plan: ChunkPlan, buffers: Tensor, span: tuple[int, int], dtype: torch.dtype
    ) -> Tensor:
        peers = buffers.shape[0]
        data = buffers[:, slice(*span)].to(plan.device).contiguous().view(dtype)
        by_chunk = data.view(peers, plan.chunks, plan.k).transpose(0, 1)
        return by_chunk.reshape(plan.chunks, peers * plan.k)
