"""Names of devices, and which one each rank of this machine takes."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch


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


def indexed(device: torch.device | str) -> torch.device:
    """The device by the one name that its tensors give it: ``cuda:0`` for ``cuda``.

    torch takes ``cuda`` and ``cuda:0``, and ``cpu`` and ``cpu:0``, for different devices when they
    are compared. A GPU without an index is the current one; one with an index is not touched.

    Raises:
        RuntimeError, AssertionError: torch's, where there is no such device.
    """
    device = torch.device(device)
    if device.type == "cuda" and device.index is not None:
        return device
    return torch.empty(0, device=device).device


def cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
