"""What a data set yields: one `Sample` per sequence, collated into the `Batch` of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from psyche_fast.batch import Batch
from psyche_fast.errors import check_name


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One training sequence of L tokens."""

    input_ids: torch.Tensor
    """`int64 [L]` token ids."""

    labels: torch.Tensor
    """`int64 [L]`, aligned with `input_ids` (the model shifts); the same tensor object as
    `input_ids` where the data has no labels of its own."""

    position_ids: torch.Tensor | None = None
    """`int64 [L]`, or None where the data has none."""

    sequence_lengths: tuple[int, ...] | None = None
    """Lengths of the documents packed into the sequence, or None where the data has none."""


class Dataset(Protocol):
    """What the prefetcher and the core need of a data set."""

    sequence_length: int

    def __len__(self) -> int:
        """Number of sequences, at least 1."""
        ...

    def get_samples(self, first: int, last: int) -> list[Sample]:
        """Samples `first` to `last`, both included."""
        ...

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise ValueError if a look at the data finds a token id that the model lacks."""
        ...


def collate(samples: Sequence[Sample]) -> Batch:
    """Stacks samples of one data set: at least one, all of one length and with the same fields."""
    labels = [s.labels for s in samples if s.labels is not s.input_ids]
    position_ids = [s.position_ids for s in samples if s.position_ids is not None]
    lengths = [list(s.sequence_lengths) for s in samples if s.sequence_lengths is not None]
    # What an absent field means is the trainer's to decide: none is filled in.
    for field in (labels, position_ids, lengths):
        assert len(field) in (0, len(samples)), "a field of some samples only"
    return Batch(
        torch.stack([s.input_ids for s in samples]),
        torch.stack(labels) if labels else None,
        torch.stack(position_ids) if position_ids else None,
        lengths or None,
    )


def check_range(first: int, last: int) -> None:
    """Raise ValueError unless `first` to `last` is a range of at least one sample id."""
    if not 0 <= first <= last:
        raise ValueError(f"sample ids must satisfy 0 <= first <= last, got {first} to {last}")


def check_token_ids(tokens: np.ndarray, vocab_size: int, where: str) -> None:
    """Raise ValueError if `tokens` (any shape) holds an id outside `[0, vocab_size)`."""
    lowest, highest = int(tokens.min()), int(tokens.max())
    if lowest < 0 or highest >= vocab_size:
        outside = lowest if lowest < 0 else highest
        raise ValueError(
            f"token id {outside} in {where} is outside the model's vocabulary of {vocab_size}: "
            "the data belong to another tokenizer (--data-path, --model) or --token-size"
        )


def visible_files(folder: Path) -> list[Path]:
    """Files below a folder in the order of their paths, but for names that begin with a dot.

    Raises:
        ValueError: a name is not UTF-8.
    """
    files = []
    for path in folder.rglob("*"):
        parts = path.relative_to(folder).parts
        if not any(part.startswith(".") for part in parts) and path.is_file():
            check_name(str(path))
            files.append(path)
    return sorted(files)


def is_train(name: str) -> bool:
    """Whether a folder's name says that the train split is in it."""
    return name == "train" or name.startswith("train-")
