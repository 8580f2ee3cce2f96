"""Packed documents: several in one row, which must not see one another.

After `prepare` the position ids alone say where documents start: wherever a position is not the
one before plus 1. Transformers' sdpa and eager attention mask by just that rule (with
`use_cache=False` and no attention mask); flash attention is given the boundaries, and where an
architecture hands them on, `documents` does without a mask on PyTorch's own kernels.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from psyche_fast.batch import IGNORE, Batch, upload


def document_starts(position_ids: Tensor) -> Tensor:
    """Where documents start: bool `[B, L]`, each row's first token included.

    Args:
        position_ids: int64 `[B, L]`.
    """
    continues = position_ids[:, 1:] == position_ids[:, :-1] + 1
    return F.pad(~continues, (1, 0), value=True)


def starts_of_lengths(sequence_lengths: list[list[int]], rows: int, length: int) -> Tensor:
    """Where documents start, by their lengths: bool `[rows, length]` on the CPU.

    Zeros are skipped; a tail that no length covers is a document of its own.

    Raises:
        ValueError: not one list a row, a negative length, or more than the row holds.
    """
    if len(sequence_lengths) != rows:
        raise ValueError(
            f"sequence_lengths: wanted a list for each of {rows} rows, got {len(sequence_lengths)}"
        )
    starts = torch.zeros(rows, length, dtype=torch.bool)
    starts[:, :1] = True
    for row, lengths in enumerate(sequence_lengths):
        if any(n < 0 for n in lengths):
            raise ValueError(f"sequence_lengths: row {row} has the negative length {min(lengths)}")
        end = 0
        for n in lengths:
            end += n
            if end > length:
                raise ValueError(
                    f"sequence_lengths: row {row} adds up to {sum(lengths)}, more than the "
                    f"{length} tokens of a row"
                )
            if n and end < length:
                starts[row, end] = True
    return starts


def prepare(batch: Batch) -> Batch:
    """Makes position ids and labels agree with the documents; doing it twice changes nothing.

    Where the batch lies on the host nothing waits for a device, here or for what is counted here.

    Args:
        batch: `B` rows of `L` tokens.

    Returns:
        a batch with `tokens`, without `sequence_lengths`, whose `position_ids` and `documents` are
        None where no row needs them, and where each document's first token has the label -100, so
        that nothing is predicted across a boundary.

    Raises:
        ValueError: labels or position ids of another shape, malformed lengths, or position ids
            that do not restart where the lengths say that a document starts.
    """
    if batch.tokens is not None:
        return _without_needless_positions(batch)
    shape, device = batch.input_ids.shape, batch.input_ids.device
    for name in ("labels", "position_ids"):
        tensor = getattr(batch, name)
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name}: wanted the shape {list(shape)}, got {list(tensor.shape)}")
    positions = batch.position_ids
    if batch.sequence_lengths is not None:
        starts = starts_of_lengths(batch.sequence_lengths, *shape).to(device)
        if positions is None:
            index = torch.arange(shape[1], device=device).expand(shape)
            positions = index - torch.where(starts, index, 0).cummax(dim=1).values
        else:
            wrong = (starts & ~document_starts(positions)).nonzero()
            if len(wrong):
                row, at = wrong[0].tolist()
                raise ValueError(
                    "position_ids must restart wherever a document starts: by sequence_lengths "
                    f"one starts at token {at} of row {row}, where the position goes on with "
                    f"{int(positions[row, at])}"
                )
    labels, documents = batch.labels, None
    if positions is not None:
        starts = document_starts(positions)
        labels = (batch.input_ids if labels is None else labels).masked_fill(starts, IGNORE)
        plain = (positions == torch.arange(shape[1], device=device)).all(dim=1).tolist()
        documents = [
            None if is_plain else _lengths(row)
            for row, is_plain in zip(starts.tolist(), plain, strict=True)
        ]
        if all(plain):
            labels = batch.labels
    prepared = replace(
        batch, labels=labels, position_ids=positions, sequence_lengths=None, documents=documents
    )
    return _without_needless_positions(replace(prepared, tokens=prepared.real_tokens()))


def _without_needless_positions(batch: Batch) -> Batch:
    """Leaves out positions that the model assumes anyway.

    That keeps attention on its fast path, without a mask of B x 1 x L x L.
    """
    if batch.documents is None or any(row is not None for row in batch.documents):
        return batch
    return replace(batch, position_ids=None, documents=None)


def _lengths(starts: list[bool]) -> list[int]:
    edges = [at for at, start in enumerate(starts) if start] + [len(starts)]
    return [after - before for before, after in pairwise(edges)]


def document_lengths(batch: Batch) -> list[int]:
    """Of the documents of a prepared batch's rows, laid end to end."""
    assert batch.documents is not None, "packed, and prepared"
    length = batch.input_ids.shape[1]
    return [n for row in batch.documents for n in ([length] if row is None else row)]


def flash_arguments(lengths: list[int], device: torch.device) -> dict[str, Any]:
    """Boundaries for flash attention, for documents laid end to end as one row.

    Args:
        lengths: of the documents.
        device: where attention runs; it is not waited for.

    Returns:
        Transformers' `cu_seq_lens_q`, `cu_seq_lens_k` (int32 `[documents + 1]`) and
        `max_length_q`, `max_length_k`.
    """
    edges = upload(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), device)
    longest = max(lengths)
    return {
        "cu_seq_lens_q": edges,
        "cu_seq_lens_k": edges,
        "max_length_q": longest,
        "max_length_k": longest,
    }
