"""A batch of token sequences, as data loads it, the wire carries it and training uses it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
"""The label that no loss counts (PyTorch's `ignore_index`)."""

T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """`B` sequences of `L` tokens, all tensors int64.

    Attributes:
        input_ids: `[B, L]`.
        labels: `[B, L]`, not shifted (the model shifts); None where they are the inputs.
        position_ids: `[B, L]`; None for 0 .. L-1.
        sequence_lengths: per row the lengths of the documents packed into it; None for one
            document a row, and where `documents` has them.
        tokens: per row its predicted tokens that count; None until `packing.prepare` has counted
            them. Known on the host, so that nothing has to wait for a device to know it.
        documents: per row the lengths of its documents, which fill it, or None where its positions
            are 0 .. L-1; None as a whole where `position_ids` is, or before `packing.prepare`.
    """

    input_ids: Tensor
    labels: Tensor | None = None
    position_ids: Tensor | None = None
    sequence_lengths: list[list[int]] | None = None
    tokens: list[int] | None = None
    documents: list[list[int] | None] | None = None

    @property
    def rows(self) -> int:
        """Number of sequences."""
        return self.input_ids.shape[0]

    def to(self, device: torch.device) -> Batch:
        """The batch on `device`, contiguous; the device is not waited for."""
        return self._each_tensor(lambda t: upload(t, device).contiguous())

    def _each_tensor(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return replace(
            self,
            input_ids=change(self.input_ids),
            labels=None if self.labels is None else change(self.labels),
            position_ids=None if self.position_ids is None else change(self.position_ids),
        )

    def slice(self, start: int, stop: int) -> Batch:
        """Rows `start` to `stop`, exclusive."""

        def cut(rows: list[T] | None) -> list[T] | None:
            return None if rows is None else rows[start:stop]

        return replace(
            self._each_tensor(lambda t: t[start:stop]),
            sequence_lengths=cut(self.sequence_lengths),
            tokens=cut(self.tokens),
            documents=cut(self.documents),
        )

    def share(self, index: int, count: int) -> Batch:
        """Part `index` of `count`: contiguous rows, the first parts one row longer at most."""
        base, more = divmod(self.rows, count)
        start = index * base + min(index, more)
        return self.slice(start, start + base + (index < more))

    def pad_rows(self, multiple: int) -> Batch:
        """Appends rows whose labels no loss counts, up to a multiple of `multiple` rows."""
        missing = -self.rows % multiple
        if missing == 0:
            return self
        pad = lambda t, value: F.pad(t, (0, 0, 0, missing), value=value)  # noqa: E731
        labels = self.input_ids if self.labels is None else self.labels
        positions = self.position_ids
        if positions is not None:
            # Not zeros: a row of zeros would read as L documents of one token each.
            row = torch.arange(positions.shape[1], device=positions.device)
            positions = torch.cat([positions, row.expand(missing, -1)])
        lengths, tokens, documents = self.sequence_lengths, self.tokens, self.documents
        return Batch(
            pad(self.input_ids, 0),
            pad(labels, IGNORE),
            positions,
            None if lengths is None else [*lengths, *([] for _ in range(missing))],
            None if tokens is None else [*tokens, *[0] * missing],
            None if documents is None else [*documents, *[None] * missing],
        )

    def micro_batches(self, size: int) -> list[Batch]:
        """`ceil(rows / size)` parts along the rows, as `torch.chunk` cuts them."""
        count = -(-self.rows // size)
        step = -(-self.rows // count)
        return [self.slice(at, min(at + step, self.rows)) for at in range(0, self.rows, step)]

    def real_tokens(self) -> list[int]:
        """Predicted tokens that count, per row (never a row's first).

        Waits for the device, unless `tokens` has them.
        """
        if self.tokens is not None:
            return self.tokens
        if self.labels is None:
            rows, length = self.input_ids.shape
            return [length - 1] * rows
        counts: list[int] = (self.labels[:, 1:] != IGNORE).sum(dim=1).tolist()
        return counts


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on `device`; one from the host goes through pinned memory, and nobody waits."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
