"""Which device each rank of this machine takes, and which of them compute alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from psyche_fast.integers import definition_hash
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
    """What a rank computes on, and by which definition it decides DisTrO's signs.

    Attributes:
        kind: `cuda` or `cpu`.
        name: for a user.
        generation: for a user.
        definition: hash of `psyche_fast.integers`; 0 of a version that had none.
    """

    kind: str
    name: str
    generation: str
    definition: int = 0

    def __str__(self) -> str:
        """For a message."""
        return f"{self.name} ({self.generation})"


def processor(device: torch.device) -> Processor:
    """Looks at a device."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        name, generation = torch.cuda.get_device_name(device), f"sm_{major}{minor}"
    else:
        name, generation = "CPU", torch.backends.cpu.get_cpu_capability()
    return Processor(device.type, name, generation, definition_hash())


def check_processors(processors: Sequence[Processor]) -> None:
    """Refuses ranks that cannot work together.

    Args:
        processors: of all ranks, in rank order.

    Raises:
        ValueError: CPUs beside GPUs, or ranks of different versions; two of them are named.
    """
    first = processors[0]
    for rank, other in enumerate(processors):
        if other.kind != first.kind:
            raise ValueError(
                f"rank 0 computes on {first}, rank {rank} on {other}: all ranks of a run "
                "need GPUs, or none (--device, and --backend of `sidecar`)"
            )
        if other.definition != first.definition:
            raise ValueError(
                f"rank {rank} decides the signs of DisTrO's updates by the definition "
                f"{other.definition:016x}, rank 0 by {first.definition:016x}: install the same "
                "version of psyche_fast on all machines"
            )
