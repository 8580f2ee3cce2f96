"""Data sets mixed by weight, in the order of Psyche's weighted data provider."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Protocol

import torch

from psyche_fast.data.order import reversed_order
from psyche_fast.data.samples import Dataset, Sample, check_range

_AHEAD = 1 << 16
"""How many draws are worked out at once."""


class Part(Dataset, Protocol):
    """A data set that can be mixed."""

    def get_ids(self, ids: Iterable[int]) -> list[Sample]:
        """The samples of these ids, in their order."""
        ...


class MixtureDataset:
    """Samples of several data sets by weight.

    An epoch has as many samples as all of them together. Each sample comes from the data set that
    is furthest behind its share, the first of several; a data set that is through begins anew.
    With a seed the whole epoch is then shuffled (`reversed_order`). After the epoch the same one
    begins again.

    Attributes:
        parts: as given.

    Args:
        parts: the data sets, all of one sequence length.
        weights: their shares, 0 or more, which are divided by their sum; None for their lengths.
        seed: of the order of the epoch, 32 bits or 32 bytes; None for that of the draws.

    Raises:
        ValueError: they cannot be mixed.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        weights: Sequence[float] | None = None,
        seed: int | bytes | None = None,
    ) -> None:
        assert parts and len({part.sequence_length for part in parts}) == 1
        self.sequence_length = parts[0].sequence_length
        self.parts = parts
        sizes = [len(part) for part in parts]
        self._length = sum(sizes)
        self._draws = _Draws(sizes, sizes if weights is None else weights)
        self._order = None if seed is None else reversed_order(self._length, seed)
        firsts = [part.get_ids([0])[0] for part in parts]
        self._labels = any(s.labels is not s.input_ids for s in firsts)
        self._position_ids = any(s.position_ids is not None for s in firsts)
        self._lengths = any(s.sequence_lengths is not None for s in firsts)
        for sample in firsts:
            if (
                self._lengths
                and sample.sequence_lengths is None
                and sample.position_ids is not None
            ):
                raise ValueError(
                    "a mixture of Parquet files with sequence_lengths and ones with position_ids "
                    "alone (--data-path): one of them has to get the other's column"
                )

    def __len__(self) -> int:
        return self._length

    def draw(self, sample_id: int) -> tuple[int, int]:
        """Which data set a sample (below the length) is of, and which of its samples it is."""
        return self._draws[sample_id if self._order is None else int(self._order[sample_id])]

    def get_samples(self, first: int, last: int) -> list[Sample]:
        """Samples `first` to `last`, both included.

        Raises:
            ValueError: if the range is empty or reaches past the end of the epoch, or a data set
                cannot be read.
            OSError: a data set cannot be read.
        """
        check_range(first, last)
        if last >= len(self):
            raise ValueError(f"sample {last} is past the end of a mixture of {len(self)} sequences")
        wanted: list[dict[int, int]] = [{} for _ in self.parts]
        for place, sample_id in enumerate(range(first, last + 1)):
            which, index = self.draw(sample_id)
            wanted[which][place] = index
        samples: dict[int, Sample] = {}
        for part, ids in zip(self.parts, wanted, strict=True):
            found = part.get_ids(list(ids.values())) if ids else []
            samples |= dict(zip(ids, map(self._completed, found), strict=True))
        return [samples[place] for place in range(last - first + 1)]

    def _completed(self, sample: Sample) -> Sample:
        """The sample with the fields that others have, meaning what their absence means."""
        length = self.sequence_length
        if self._labels and sample.labels is sample.input_ids:
            sample = replace(sample, labels=sample.input_ids.clone())
        if self._lengths and sample.sequence_lengths is None:
            sample = replace(sample, sequence_lengths=(length,))
        if self._position_ids and sample.position_ids is None:
            pieces = [torch.arange(n) for n in sample.sequence_lengths or (length,)]
            positions = torch.cat(pieces) if pieces else torch.arange(length)
            rest = torch.arange(length - len(positions))
            sample = replace(sample, position_ids=torch.cat([positions, rest]))
        return sample

    def check_vocabulary(self, vocab_size: int) -> None:
        """Look at each data set.

        Raises:
            ValueError: if a token id is not below `vocab_size`.
        """
        for part in self.parts:
            part.check_vocabulary(vocab_size)


class _Draws:
    """The unshuffled draws of an epoch, worked out as far as they have been asked for."""

    def __init__(self, sizes: Sequence[int], weights: Sequence[float]) -> None:
        total = 0.0
        for weight in weights:  # one after the other: `sum` rounds otherwise, from Python 3.12 on
            total += weight
        self._shares = [
            (which, weight / total, size)
            for which, (weight, size) in enumerate(zip(weights, sizes, strict=True))
            if size
        ]
        self._drawn = [0] * len(sizes)
        self._length = sum(sizes)
        self._which = array("H")
        self._index = array("Q")

    def __getitem__(self, number: int) -> tuple[int, int]:
        if number >= len(self._which):
            self._extend(min(number + _AHEAD, self._length))
        return self._which[number], self._index[number]

    def _extend(self, end: int) -> None:
        drawn, shares = self._drawn, self._shares
        for number in range(len(self._which), end):
            before = float(max(number, 1))
            most, chosen, length = -float("inf"), 0, 1
            for which, share, size in shares:
                behind = share * before - drawn[which]
                if behind > most:
                    most, chosen, length = behind, which, size
            self._which.append(chosen)
            self._index.append(drawn[chosen] % length)
            drawn[chosen] += 1
