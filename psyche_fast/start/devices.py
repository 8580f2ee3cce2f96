"""Which device each rank of this machine takes."""

from __future__ import annotations

import os
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
    """Resolves ``--device`` for ``ranks`` ranks on this machine.

    Args:
        spec: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``cuda:X,Y``.
        ranks: how many ranks run here.

    Raises:
        ValueError: another word, a GPU that is not there, or not one GPU for each rank.
    """
    there = torch.cuda.device_count()
    if spec == "cpu" or (spec == "auto" and there == 0):
        return Devices((torch.device("cpu"),) * ranks, "gloo")
    head, _, numbers = spec.partition(":")
    if spec not in ("auto", "cuda") and not (
        head == "cuda" and all(n.isdecimal() for n in numbers.split(","))
    ):
        raise ValueError(f"--device: wanted auto, cpu, cuda, cuda:N or cuda:X,Y, got {spec!r}")
    if there == 0:
        raise ValueError(f"--device {spec}: this machine has no CUDA device (--device cpu runs)")
    indices = [int(n) for n in numbers.split(",")] if numbers else list(range(there))
    missing = [n for n in indices if n >= there]
    if missing:
        raise ValueError(f"--device {spec}: this machine has {there} CUDA devices, no {missing[0]}")
    if len(set(indices)) != len(indices):
        raise ValueError(f"--device {spec}: a device is named twice")
    if len(indices) < ranks:
        raise ValueError(
            f"--device {spec}: {ranks} ranks on this machine need {ranks} GPUs, there are "
            f"{len(indices)} (lower --replicas, --data-parallelism or --tensor-parallelism)"
        )
    return Devices(tuple(torch.device("cuda", n) for n in indices[:ranks]), "nccl")


def device_of_launched(spec: str, place: Launched) -> tuple[torch.device, str]:
    """The device of a rank that torchrun or Slurm started, and the backend that fits it.

    Ranks that see all of their machine's GPUs take one each. Where Slurm gives every task GPUs of
    its own (`--gpus-per-task`, `--gpu-bind`), a task sees only these, and takes the first.

    Args:
        spec: as of `choose_devices`.
        place: this rank's.

    Raises:
        ValueError: as of `choose_devices`.
    """
    ranks, own = place.local_world_size, place.local_rank
    visible = torch.cuda.device_count()
    if 0 < visible < ranks and place.has_own_gpus:
        ranks, own = 1, 0
    chosen = choose_devices(spec, ranks)
    return chosen.devices[own], chosen.backend


def cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
