"""The check that replicas hold the same bits: a 64-bit hash of every parameter, compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor

from psyche_fast.distro import exchange

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Odd, so invertible modulo 2^64: a change of one word always changes the hash.
_MULTIPLIER = -7046029254386353131
# On a CPU the slice and its weights stay in the cache; on a GPU a launch should be worth it.
_SLICE = {"cpu": 1 << 16, "cuda": 1 << 24}


class ReplicasDiffer(RuntimeError):
    """Parameters of the replicas are no longer bit-identical; the run cannot go on."""


@cache
def _weights(device: torch.device) -> Tensor:
    n = torch.arange(1, 2 * _SLICE[device.type], 2, dtype=torch.int64, device=device)
    return n * _MULTIPLIER


def hash_bits(tensor: Tensor) -> Tensor:
    """A position-dependent hash of a tensor's bits: int64, 0-d, on its device.

    Integer arithmetic modulo 2^64: the same in any order of additions.
    """
    words = tensor.detach().contiguous().view(-1).view(_WORDS[tensor.element_size()])
    return hash_rows(words.unsqueeze(0))[0]


def hash_rows(words: Tensor) -> Tensor:
    """`hash_bits` of each row: int64 `[n]` of integers `[n, words]`."""
    weights = _weights(words.device)
    total = torch.zeros(len(words), dtype=torch.int64, device=words.device)
    for part in words.split(weights.numel(), dim=1):
        total = total * _MULTIPLIER + (part * weights[: part.shape[1]]).sum(dim=1)
    return total


@dataclass(frozen=True)
class PendingCheck:
    """A comparison under way."""

    _names: tuple[str, ...]
    _hashes: exchange.Pending
    _step: int

    def finish(self) -> None:
        """Waits for the peers' hashes and compares them.

        Raises:
            ReplicasDiffer: on every peer, naming the first tensors that differ.
        """
        hashes = self._hashes.wait()
        differ = hashes.ne(hashes[0]).any(dim=0).tolist()
        names = [name for name, bad in zip(self._names, differ, strict=True) if bad]
        if names:
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise ReplicasDiffer(
                f"step {self._step}: replicas are no longer bit-identical in {len(names)} of "
                f"{len(self._names)} parameters: {shown}"
            )


def start(tensors: Mapping[str, Tensor], peers: dist.ProcessGroup, step: int) -> PendingCheck:
    """Begins to compare this rank's tensors with its counterparts in the other replicas.

    Args:
        tensors: this rank's parts, by name; the same names on every peer, at least one.
        peers: the group to compare with.
        step: for the message.
    """
    own = torch.stack([hash_bits(t) for t in tensors.values()])
    return PendingCheck(tuple(tensors), exchange.start(own, peers), step)
