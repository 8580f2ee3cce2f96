"""Which device each rank of this machine takes, and which of them compute alike."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from psyche_fast.start.cluster import Launched


@dataclass(frozen=True)
class Devices:
    """Devices of the ranks on this machine, in rank order, and the backend that fits them."""

    devices: tuple[torch.device, ...]
    backend: str

    def describe(self) -> str:
        """For a line on the console."""
        return f"{', '.join(map(str, self.devices))} ({self.backend})"


def choose_devices(spec: str, ranks: int) -> Devices:
    """Resolves `--device` for `ranks` ranks on this machine.

    Args:
        spec: `auto`, `cpu`, `cuda`, `cuda:N` or `cuda:X,Y`.
        ranks: how many ranks run on this machine.

    Raises:
        ValueError: another word, a GPU that does not exist, or not one GPU for each rank.
    """
    count = torch.cuda.device_count()
    if spec == "cpu" or (spec == "auto" and count == 0):
        return Devices((torch.device("cpu"),) * ranks, "gloo")
    head, _, numbers = spec.partition(":")
    if spec not in ("auto", "cuda") and not (
        head == "cuda" and all(n.isdecimal() for n in numbers.split(","))
    ):
        raise ValueError(f"--device: wanted auto, cpu, cuda, cuda:N or cuda:X,Y, got {spec!r}")
    if count == 0:
        raise ValueError(f"--device {spec}: this machine has no CUDA device (--device cpu runs)")
    indices = [int(n) for n in numbers.split(",")] if numbers else list(range(count))
    missing = [n for n in indices if n >= count]
    if missing:
        raise ValueError(f"--device {spec}: this machine has {count} CUDA devices, no {missing[0]}")
    if len(set(indices)) != len(indices):
        raise ValueError(f"--device {spec}: a device is named twice")
    if len(indices) < ranks:
        raise ValueError(
            f"--device {spec}: {ranks} ranks on this machine need {ranks} GPUs, there are "
            f"{len(indices)} (lower --replicas, --data-parallelism or --tensor-parallelism)"
        )
    return Devices(tuple(torch.device("cuda", n) for n in indices[:ranks]), "nccl")


def device_of_launched(spec: str, launch: Launched) -> tuple[torch.device, str]:
    """The device of a rank that torchrun or Slurm started, and the backend that fits it.

    Ranks that see all of their machine's GPUs take one each. Where Slurm gives every task GPUs of
    its own (`--gpus-per-task`, `--gpu-bind`), a task sees only these, and takes the first.

    Args:
        spec: as of `choose_devices`.
        launch: this rank's.

    Raises:
        ValueError: as of `choose_devices`.
    """
    ranks, own = launch.local_world_size, launch.local_rank
    visible = torch.cuda.device_count()
    if 0 < visible < ranks and launch.has_own_gpus:
        ranks, own = 1, 0
    chosen = choose_devices(spec, ranks)
    return chosen.devices[own], chosen.backend


def choose_gpu(spec: str) -> torch.device:
    """The GPU that `--device` of `--autotune` names, with its index.

    Raises:
        ValueError: there is none, or it is no GPU.
    """
    if not torch.cuda.is_available():
        raise ValueError(f"--autotune --device {spec}: this machine has no CUDA device")
    device = choose_devices(spec, 1).devices[0]
    if device.type != "cuda":
        raise ValueError(f"--autotune needs a CUDA device, got --device {spec}")
    return device


@dataclass(frozen=True)
class Processor:
    """What a rank computes on.

    Attributes:
        kind: `cuda` or `cpu`.
        name: for a user.
        generation: processors of one kind and generation come to the same bits in DisTrO's step.
    """

    kind: str
    name: str
    generation: str

    def __str__(self) -> str:
        """For a message."""
        return f"{self.name} ({self.generation})"


def processor(device: torch.device) -> Processor:
    """Looks at a device.

    The tensor cores of two generations of GPUs add up in different orders, as do vector units of
    different widths; sizes of memory and numbers of multiprocessors change no bit.
    """
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return Processor("cuda", torch.cuda.get_device_name(device), f"sm_{major}{minor}")
    return Processor(device.type, "CPU", torch.backends.cpu.get_cpu_capability())


def check_processors(
    processors: Sequence[Processor], ranks_per_replica: int, *, mixed: bool
) -> None:
    """Refuses ranks that cannot work together.

    Args:
        processors: of all ranks, in rank order.
        ranks_per_replica: ranks that together hold one copy of the model. They may be of several
            generations, as long as each one's counterparts in the other replicas are like it.
        mixed: let replicas try it with several generations.

    Raises:
        ValueError: CPUs beside GPUs, or replicas on several generations; two of them are named.
    """
    for rank, other in enumerate(processors):
        peer = rank % ranks_per_replica
        if other.kind != processors[0].kind:
            raise ValueError(
                f"rank 0 computes on {processors[0]}, rank {rank} on {other}: all ranks of a run "
                "need GPUs, or none (--device, and --backend of `sidecar`)"
            )
        if other.generation != processors[peer].generation and not mixed:
            raise ValueError(
                f"rank {peer} computes on {processors[peer]}, rank {rank} on {other}: replicas on "
                "several generations of processors do not come to the same bits (--mixed-gpus "
                "tries it all the same)"
            )


def cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
