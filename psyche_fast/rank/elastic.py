"""A rank's part in replicas' coming and going: how it becomes a member, and welcomes others."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from psyche_fast.rank.epochs import Epochs, Place
from psyche_fast.rank.handover import Handover, take_up
from psyche_fast.rank.members import Joiner, Request, key, put
from psyche_fast.rank.topology import join
from psyche_fast.rank.trainer import Trainer
from psyche_fast.ranks import Parallelism
from psyche_fast.start.store import StoreClient


def most_replicas(options: Parallelism) -> int:
    """How many replicas an elastic run may have."""
    return max(options.replicas, options.max_replicas)


def join_own(
    store: dist.Store, backend: str, place: Place, device: torch.device, timeout: timedelta
) -> None:
    """Joins the default process group of a replica's own ranks."""
    own = dist.PrefixStore(f"elastic/replicas/{place.replica}/{place.life}", store)
    join(backend, own, place.size, place.place, device, timeout)


@dataclass(frozen=True)
class Start:
    """A further rank of an elastic run, as it is started.

    Attributes:
        backend: inside the replica.
        rank: among those of all replicas.
        life: which life of the replica it is of.
        timeout: until a collective that a rank misses is an error.
    """

    backend: str
    rank: int
    life: str
    timeout: timedelta

    def epochs(self, client: StoreClient, options: Parallelism, device: torch.device) -> Epochs:
        """Joins the replica's own process group; what is for `enter`.

        Raises:
            ValueError: the core's run is not elastic, or does not have so many replicas.
        """
        if not options.elastic:
            raise ValueError("sidecar --elastic: the core's run is not elastic; leave it out")
        replica, number = divmod(self.rank, options.ranks_per_replica)
        most = most_replicas(options)
        if replica >= most:
            raise ValueError(
                f"--start-rank: rank {self.rank} is of replica {replica}, but the run has at most "
                f"{most} (--max-replicas of the core)"
            )
        place = Place(replica, number, options.ranks_per_replica, most, self.life)
        # Those that are there from the start are asked for before there is a first epoch.
        joins = replica >= options.replicas or client.store.check([key(0)])
        join_own(client.store, self.backend, place, device, self.timeout)
        # Here `client.seconds` is the core's --timeout.
        return Epochs(client.clone(), place, client.seconds, client.asking, joins=joins)


def enter(epochs: Epochs, client: StoreClient, trainer: Trainer) -> int:
    """Becomes a member once the model is loaded; the first operation that is for this rank.

    Raises:
        ValueError: rank 0 refuses, or what a member has handed over is damaged.
        RuntimeError: the members do not come together.
    """
    meet_own(trainer)
    if epochs.place.place == 0:
        put(client.store, key("join", epochs.place.replica), Request(life=epochs.place.life))
    epochs.begin()
    if not epochs.joins:
        return 0
    operation, state = epochs.admitted.result()
    take_up(trainer, state)
    return operation


def meet_own(trainer: Trainer) -> None:
    """Meets the replica's other ranks."""
    if trainer.topology.host is not None:
        dist.barrier(trainer.topology.host)


def welcome(trainer: Trainer, joiner: Joiner | None = None) -> None:
    """Has a replica join after a step that all members have made.

    Args:
        trainer: of a member.
        joiner: on rank 0, who joins.
    """
    peers = trainer.topology.peers
    assert isinstance(peers, Epochs)
    trainer.plain()
    peers.welcome(Handover.of(trainer) if trainer.topology.replica == 0 else None, joiner)
