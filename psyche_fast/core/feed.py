"""Batches on their way from the data to the ranks, a step ahead of the step that trains them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from psyche_fast.batch import IGNORE, Batch
from psyche_fast.metrics import PhaseTimer
from psyche_fast.models import packing
from psyche_fast.rank.protocol import Sender, Train


@dataclass(frozen=True)
class Sent:
    """A step that the other replicas have been sent.

    Attributes:
        number: its operation's.
        mine: what rank 0's own replica trains.
        tokens: of all replicas, padding included.
        bytes: what another replica is sent.
        rows: of each replica.
    """

    number: int
    mine: Train
    tokens: int
    bytes: int
    rows: Mapping[int, int]


@dataclass
class Feed:
    """Sends each of the steps' batches.

    Args:
        batches: gives the steps' batches in turn.
        sender: takes them.
        vocabulary: token ids that the model knows; None if that is not known.
        timer: reading is its phase `data`, sending `send`.
    """

    batches: Iterator[tuple[int, Batch]]
    sender: Sender
    vocabulary: int | None
    timer: PhaseTimer
    _next: Sent | ValueError | OSError | None = field(default=None, init=False)

    def send(self, step: int) -> None:
        """Leaves a step for the other replicas, each its share; `take` raises what is wrong."""
        try:
            with self.timer.phase("data"):
                _, batch = next(self.batches)
                check(step, batch, self.vocabulary)
        except (ValueError, OSError) as error:
            self._next = error
            return
        with self.timer.phase("send"):
            members = [0, *sorted(self.sender.others)]
            shares = {r: batch.share(at, len(members)) for at, r in enumerate(members)}
            parts = {r: Train.of(step, share) for r, share in shares.items()}
            mine = parts.pop(0)
            number, size = self.sender.publish_parts(parts)
            rows = {r: share.rows for r, share in shares.items()}
            self._next = Sent(number, mine, batch.input_ids.numel(), size, rows)

    def take(self) -> Sent:
        """What was sent last.

        Raises:
            ValueError: the batch cannot be read or has a token that the model does not know.
            OSError: the batch cannot be read.
        """
        sent, self._next = self._next, None
        assert sent is not None, "`send` comes before `take`"
        if not isinstance(sent, Sent):
            raise sent
        return sent


def check(step: int, batch: Batch, vocabulary: int | None) -> None:
    """Refuses a batch before it is sent: where it is trained, a replica alone would end.

    Raises:
        ValueError: malformed documents, or a token or label that the model does not know.
    """
    try:
        packing.prepare(batch)
    except ValueError as error:
        raise ValueError(f"step {step}: {error} (--data-path)") from error
    lowest = 0 if batch.position_ids is None else int(batch.position_ids.min())
    if lowest < 0:
        raise ValueError(f"step {step}: position_ids: {lowest} is less than 0 (--data-path)")
    labels = batch.labels
    masked = "" if labels is None else f"; labels that no loss is to count are {IGNORE}"
    tensors = {"input_ids": batch.input_ids}
    if labels is not None:
        tensors["labels"] = labels[labels != IGNORE]
    for key, tensor in tensors.items():
        outside = _outside(tensor, vocabulary)
        if outside is not None:
            raise ValueError(
                f"step {step}: {key}: token id {outside} in the data is outside the model's "
                f"vocabulary of {vocabulary or 'tokens from 0'} (--data-path, --model"
                f"{masked if key == 'labels' else ''})"
            )


def _outside(tensor: Tensor, vocabulary: int | None) -> int | None:
    if not tensor.numel():
        return None
    lowest, highest = (int(t) for t in torch.aminmax(tensor))
    if lowest < 0:
        return lowest
    return highest if vocabulary is not None and highest >= vocabulary else None
