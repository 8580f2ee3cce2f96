"""Data that are all zeros, for trying a run out (`--data-path dummy:`)."""

from __future__ import annotations

import sys
from collections.abc import Iterable

import torch

from psyche_fast.data.samples import Sample, check_range


class DummyDataset:
    """Sequences of token 0 without end, as Psyche's dummy data.

    Args:
        sequence_length: tokens to a sequence, L.
    """

    def __init__(self, sequence_length: int) -> None:
        self.sequence_length = sequence_length

    def __len__(self) -> int:
        return sys.maxsize

    def get_samples(self, first: int, last: int) -> list[Sample]:
        """Samples `first` to `last`, both included.

        Raises:
            ValueError: if the range is empty.
        """
        check_range(first, last)
        return self.get_ids(range(first, last + 1))

    def get_ids(self, ids: Iterable[int]) -> list[Sample]:
        """The samples of these ids."""
        zeros = torch.zeros(self.sequence_length, dtype=torch.int64)
        return [Sample(zeros, zeros) for _ in ids]

    def check_vocabulary(self, vocab_size: int) -> None:
        """Every vocabulary has a token 0."""
