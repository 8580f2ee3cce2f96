"""What the ranks of one replica do to show how good its model is; training does not notice it.

The plain parameters, which all replicas share, are what is looked at: what comes out is the same
however many replicas there are, and the others wait. Random numbers are left where they were.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from psyche_fast.batch import Batch, upload
from psyche_fast.rank.trainer import Trainer

TEMPERATURE = 0.7
"""Of samples: less surprising than what the model has learnt, not one word over and over."""


@contextmanager
def _looking(trainer: Trainer) -> Iterator[None]:
    """Within, the model has its plain parameters and nothing random in its forward."""
    trainer.plain()
    device = trainer.model.device
    trainer.model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        trainer.model.train()


def evaluate(trainer: Trainer, batch: Batch) -> float:
    """Loss of held-out rows; all ranks of a replica call it alike, between steps.

    Args:
        trainer: this rank's.
        batch: at most as many rows as the replica's ranks take in one forward.

    Returns:
        Sum of the cross-entropies over all tokens that are predicted and count, in nats; the same
        on each rank.

    Raises:
        ValueError: malformed sequence lengths or position ids.
    """
    place = trainer.topology
    with _looking(trainer):
        mine = batch.pad_rows(place.dp).share(place.shard, place.dp)
        total = trainer.model.summed_loss(mine)
        if place.shard_mesh is not None:
            dist.all_reduce(total, group=place.shard_mesh.get_group())
    return float(total)


def continued(trainer: Trainer, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """Continues prompts by sampling; all ranks of a replica call it alike, between steps.

    Without a cache, so that it is one way for all architectures and however they are split: rows
    are as long as the longest will be from the beginning on, and what is to come is not seen.

    Args:
        trainer: this rank's.
        prompts: token ids, one or more each.
        tokens: how many to add to each.

    Returns:
        What was added, on the replica's first rank; elsewhere whatever that has said.
    """
    place, lengths = trainer.topology, [len(prompt) for prompt in prompts]
    rows = torch.zeros(len(prompts), max(lengths) + tokens, dtype=torch.int64)
    for row, prompt in zip(rows, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    generator = torch.Generator().manual_seed(0)  # the same at all steps: they can be compared
    numbers, ends = torch.arange(len(prompts)), torch.tensor(lengths)
    with _looking(trainer):
        for _ in range(tokens):
            logits, _ = trainer.model.forward(Batch(upload(rows, trainer.model.device)))
            chosen = _chosen(logits.cpu()[numbers, ends - 1], generator)
            if place.host is not None:  # whatever rounding differs: they have to go on alike
                dist.broadcast(chosen, group=place.host, group_src=0)
            rows[numbers, ends] = chosen
            ends += 1
    return [row[n : n + tokens].tolist() for row, n in zip(rows, lengths, strict=True)]


def _chosen(logits: Tensor, generator: torch.Generator) -> Tensor:
    """A token for each row `[B, V]`; the likeliest where the logits are not finite."""
    likely = F.softmax(logits.float() / TEMPERATURE, dim=1)
    if not likely.isfinite().all():
        return logits.nan_to_num().argmax(dim=1)
    return torch.multinomial(likely, 1, generator=generator)[:, 0]
