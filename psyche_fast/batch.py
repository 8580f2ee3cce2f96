"""A batch of token sequences, as data loads it, the wire carries it and training uses it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
"""The label that no loss counts (PyTorch's ``ignore_index``)."""


@dataclass(frozen=True)
class Batch:
    """``B`` sequences of ``L`` tokens, all tensors int64.

    Attributes:
        input_ids: ``[B, L]``.
        labels: ``[B, L]``, not shifted (the model shifts); None where they are the inputs.
        position_ids: ``[B, L]``; None for 0 .. L-1.
        sequence_lengths: per row the lengths of the documents packed into it; None for one
            document a row.
    """

    input_ids: Tensor
    labels: Tensor | None = None
    position_ids: Tensor | None = None
    sequence_lengths: list[list[int]] | None = None

    @property
    def rows(self) -> int:
        """Number of sequences."""
        return self.input_ids.shape[0]

    def to(self, device: torch.device) -> Batch:
        """The batch on ``device``, contiguous."""
        move = lambda t: None if t is None else t.to(device, non_blocking=True).contiguous()  # noqa: E731
        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=True).contiguous(),
            labels=move(self.labels),
            position_ids=move(self.position_ids),
        )

    def slice(self, start: int, stop: int) -> Batch:
        """Rows ``start`` to ``stop``, exclusive."""
        cut = lambda t: None if t is None else t[start:stop]  # noqa: E731
        lengths = self.sequence_lengths
        return Batch(
            self.input_ids[start:stop],
            cut(self.labels),
            cut(self.position_ids),
            None if lengths is None else lengths[start:stop],
        )

    def share(self, index: int, count: int) -> Batch:
        """Part ``index`` of ``count``: contiguous rows, the first parts one row longer at most."""
        base, more = divmod(self.rows, count)
        start = index * base + min(index, more)
        return self.slice(start, start + base + (index < more))

    def pad_rows(self, multiple: int) -> Batch:
        """Appends rows whose labels no loss counts, up to a multiple of ``multiple`` rows."""
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
        lengths = self.sequence_lengths
        return Batch(
            pad(self.input_ids, 0),
            pad(labels, IGNORE),
            positions,
            None if lengths is None else [*lengths, *([] for _ in range(missing))],
        )

    def micro_batches(self, size: int) -> list[Batch]:
        """``ceil(rows / size)`` parts along the rows, as ``torch.chunk`` cuts them."""
        count = -(-self.rows // size)
        step = -(-self.rows // count)
        return [self.slice(at, min(at + step, self.rows)) for at in range(0, self.rows, step)]

    def real_tokens(self) -> Tensor:
        """Predicted tokens that count, per row: ``[B]`` int64 (never a row's first)."""
        if self.labels is None:
            rows, length = self.input_ids.shape
            return torch.full((rows,), length - 1, device=self.input_ids.device)
        return (self.labels[:, 1:] != IGNORE).sum(dim=1)
