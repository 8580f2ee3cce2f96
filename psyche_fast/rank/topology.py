"""Who this rank is: which replica, which shard, which slice of each layer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from psyche_fast.compat import set_default_timeout
from psyche_fast.distro.gathers import Gathers
from psyche_fast.ranks import Parallelism
from psyche_fast.start.network import check_interfaces

GRACE = timedelta(seconds=5)
"""Collectives give up so much later than the core's watch, which knows whom they wait for."""


def join(
    backend: str,
    store: dist.Store,
    world_size: int,
    rank: int,
    device: torch.device,
    timeout: timedelta,
) -> None:
    """Joins the default process group, whose collectives take at most `timeout` and `GRACE`.

    Raises:
        ValueError: the environment names an interface that this machine does not have.
    """
    check_interfaces()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    most = timeout + GRACE
    set_default_timeout(most)  # before the groups are made
    dist.init_process_group(
        backend=backend, store=store, world_size=world_size, rank=rank, timeout=most
    )
    torch.manual_seed(1337)  # Psyche's; models that draw numbers draw the same ones on all ranks


@dataclass(frozen=True)
class Topology:
    """A rank's place: `rank = (replica * dp + shard) * tp + slice`.

    Attributes:
        replicas: copies of the model (groups of `dp * tp` ranks).
        replica: this rank's copy.
        dp: ranks that shard one copy with FSDP2.
        tp: ranks that share each layer.
        shard: this rank's index of `dp`.
        shard_mesh: mesh of the `dp` ranks; None where dp = 1.
        tensor_mesh: mesh of the `tp` ranks; None where tp = 1.
        peers: group of the ranks with the same place in the other replicas, or in an elastic run
            what stands for one; None for one replica.
        copy: group of all ranks of this replica; None where it is one rank.
        everyone: group of all ranks, for what is small; None for the default group.
        host: group of all ranks of this replica that passes on what lies in host memory (gloo);
            None where it is one rank.
        rank: this rank's number among those of all replicas.
    """

    replicas: int = 1
    replica: int = 0
    dp: int = 1
    tp: int = 1
    shard: int = 0
    shard_mesh: DeviceMesh | None = None
    tensor_mesh: DeviceMesh | None = None
    peers: dist.ProcessGroup | Gathers | None = None
    copy: dist.ProcessGroup | None = None
    everyone: dist.ProcessGroup | None = None
    host: dist.ProcessGroup | None = None
    rank: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this is the first rank of its replica."""
        return self.copy is None or dist.get_rank(self.copy) == 0

    @staticmethod
    def of(options: Parallelism, device: torch.device, peers: Gathers | None = None) -> Topology:
        """Makes the groups of a run; every rank of the default process group takes part.

        Args:
            options: resolved: `device_backend` says what goes between replicas.
            device: this rank's.
            peers: of an elastic run, in which the default process group is the replica's own.

        Raises:
            ValueError: the world is not the run's.
        """
        if peers is not None:
            alone = Topology.build(
                options.data_parallelism, options.tensor_parallelism, device, host=True
            )
            replica = peers.rank // peers.size
            return replace(
                alone, replicas=peers.replicas, replica=replica, peers=peers, rank=peers.rank
            )
        if dist.is_initialized() and dist.get_world_size() != options.world_size:
            raise ValueError(
                f"--replicas {options.replicas} x --data-parallelism {options.data_parallelism} x "
                f"--tensor-parallelism {options.tensor_parallelism} is not the world size "
                f"{dist.get_world_size()}"
            )
        return Topology.build(
            options.data_parallelism,
            options.tensor_parallelism,
            device,
            split=options.device_backend == "split",
            host=True,
        )

    @staticmethod
    def build(
        dp: int, tp: int, device: torch.device, *, split: bool = False, host: bool = False
    ) -> Topology:
        """Makes the groups; every rank of the default process group takes part.

        Args:
            dp: ranks that shard one copy.
            tp: ranks that share each layer.
            device: this rank's.
            split: what goes from replica to replica goes over gloo, whatever the default group's
                backend is.
            host: with the group of that name.

        Raises:
            ValueError: the world does not divide into groups of `dp * tp`, or torch's checks
                between ranks cannot be had with tensor parallelism.
        """
        if not dist.is_initialized():
            if dp * tp != 1:
                raise ValueError(f"dp {dp} x tp {tp} needs a process group of several ranks")
            return Topology()
        world, rank = dist.get_world_size(), dist.get_rank()
        if world % (dp * tp):
            raise ValueError(f"world size {world} is not a multiple of dp {dp} x tp {tp}")
        replicas = world // (dp * tp)
        if world == 1:
            return Topology()
        if tp > 1 and dist.get_debug_level() == dist.DebugLevel.DETAIL:
            _check_debugging()
        mesh = init_device_mesh(
            device.type, (replicas, dp, tp), mesh_dim_names=("replicate", "shard", "tensor")
        )
        peers = mesh.get_group("replicate") if replicas > 1 else None
        everyone = None
        if split and replicas > 1:
            everyone = dist.new_group(backend="gloo")
            for place in range(dp * tp):
                group = dist.new_group(list(range(place, world, dp * tp)), backend="gloo")
                if rank % (dp * tp) == place:
                    peers = group
        copy = on_host = None
        if dp * tp > 1:
            for replica in range(replicas):
                ranks = range(replica * dp * tp, (replica + 1) * dp * tp)
                groups = [dist.new_group(list(ranks))]
                if host:
                    groups.append(dist.new_group(list(ranks), backend="gloo"))
                if rank in ranks:
                    copy, on_host = groups[0], groups[-1] if host else None
        if dp > 1 and tp > 1:
            inner = mesh["shard", "tensor"]
            shard_mesh, tensor_mesh = inner["shard"], inner["tensor"]
        else:
            shard_mesh, tensor_mesh = mesh["shard"], mesh["tensor"]
        return Topology(
            replicas=replicas,
            replica=rank // (dp * tp),
            dp=dp,
            tp=tp,
            shard=rank // tp % dp,
            shard_mesh=shard_mesh if dp > 1 else None,
            tensor_mesh=tensor_mesh if tp > 1 else None,
            peers=peers,
            copy=copy,
            everyone=everyone,
            host=on_host,
            rank=rank,
        )


def _check_debugging() -> None:
    # Older wrappers of process groups lack the all-gather by which DTensors change placement.
    if torch.__version__ < "2.13":  # compares as versions do
        raise ValueError(
            "TORCH_DISTRIBUTED_DEBUG=DETAIL with tensor parallelism needs torch 2.13 or newer, "
            f"this is {torch.__version__}; OFF and INFO work"
        )
