"""The check that replicas hold the same bits: a 64-bit hash of every parameter, compared."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from psyche_fast.distro import exchange
from psyche_fast.distro.gathers import Gathers, Numbers
from psyche_fast.distro.message import hash_bits

log = logging.getLogger(__name__)


class ReplicasDiffer(RuntimeError):
    """Parameters of the replicas are no longer bit-identical; the run cannot go on."""


@dataclass(frozen=True)
class PendingCheck:
    """A comparison under way.

    Attributes:
        step: the step whose parameters are compared.
    """

    step: int
    _names: Sequence[str]
    _hashes: exchange.Pending | Numbers
    _who: str

    def finish(self) -> None:
        """Wait for the other replicas' hashes and compare, without waiting for the device.

        In an elastic run those that differ from more than half end, and the others go on.

        Raises:
            ReplicasDiffer: on every peer, naming the first tensors that differ.
        """
        hashes = self._hashes.host()
        differ = hashes.ne(hashes[0]).any(dim=0).tolist()
        names = [name for name, bad in zip(self._names, differ, strict=True) if bad]
        if names:
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")
            said = (
                f"step {self.step}: {self._who} are no longer bit-identical in {len(names)} of "
                f"{len(self._names)} parameters: {shown}"
            )
            others = self._hashes.others() if isinstance(self._hashes, Numbers) else None
            if others is None:
                raise ReplicasDiffer(said)
            log.error("%s; without rank %s, which most differ from", said, others)


def hashed(tensors: Sequence[Tensor]) -> Tensor:
    """What `start` compares of tensors: int64 `[n]`, on their device."""
    hashes = [hash_bits(tensor) for tensor in tensors]
    return torch.stack(hashes) if hashes else torch.zeros(0, dtype=torch.int64)


def start(
    tensors: Mapping[str, Tensor],
    peers: dist.ProcessGroup | Gathers,
    step: int,
    who: str = "replicas",
    *,
    hashes: Tensor | None = None,
) -> PendingCheck:
    """Begin to compare this rank's tensors with its counterparts in the other replicas.

    Hashes take as long as several round trips, and on NCCL they queue behind results under way:
    `PendingCheck.finish` a step later waits for neither. The tensors may change as soon as this
    returns.

    Args:
        tensors: this rank's parts, by name; the same names on every peer.
        peers: the group to compare with.
        step: for the message.
        who: for the message, what the peers are.
        hashes: of `hashed`, where they are known by now.
    """
    own = hashed(list(tensors.values())) if hashes is None else hashes
    if isinstance(peers, Gathers):
        return PendingCheck(step, list(tensors), Numbers.begin(own, peers), who)
    return PendingCheck(step, list(tensors), exchange.start(own, peers if tensors else None), who)
