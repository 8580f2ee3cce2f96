"""`--micro-batch auto`: as many sequences to a forward as memory is there for, by the estimate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from psyche_fast.config import RunConfig
from psyche_fast.core.estimate import estimate

_SHARE = 0.85
"""Of what is free. The rest is for what allocators waste, and for what an estimate does not see."""
_PROCESS = 700 << 20
"""What a rank's libraries and buffers hold in host memory, beside what is estimated."""


@dataclass(frozen=True)
class Fit:
    """What was found.

    Attributes:
        micro_batch: sequences of a forward on one rank.
        needed: bytes of a rank with them, by the estimate.
        free: bytes that there are for a rank.
    """

    micro_batch: int
    needed: int
    free: int


def largest_micro_batch(
    config: RunConfig, model: dict[str, Any], device: torch.device, ranks_here: int
) -> Fit:
    """The largest micro-batch that fits, and no larger than a step's share of a rank.

    Of those that need as many forwards in a step it is the smallest.

    Args:
        config: the run.
        model: `config.json` of its model.
        device: a rank's; the others' are taken to be like it.
        ranks_here: ranks that share this host's memory.

    Raises:
        ValueError: not even one sequence fits, or the model cannot be estimated.
    """
    parallelism = config.parallelism
    rows = math.ceil(config.run.total_batch / parallelism.replicas / parallelism.data_parallelism)
    free = free_bytes(device, ranks_here)

    def needed(size: int) -> int:
        try:
            need = estimate(model, config.replace(micro_batch=size), device.type)
        except ValueError as error:
            raise ValueError(f"--micro-batch auto: {error}; give a number") from error
        host = 0 if device.type == "cuda" else need.snapshot + _PROCESS
        return need.memory + host

    one = needed(1)
    if one > free:
        raise ValueError(
            f"--micro-batch auto: not even one sequence fits: a rank needs {one / 1e9:.1f} GB by "
            f"the estimate and has {free / 1e9:.1f} GB; more --data-parallelism, "
            "--activation-checkpointing or a shorter --sequence-length help"
        )
    if rows == 1:
        return Fit(1, one, free)
    each = max(1, needed(2) - one)  # activations grow in proportion
    size = max(1, min(rows, 1 + (free - one) // each))
    while True:
        size = math.ceil(rows / math.ceil(rows / size))
        found = needed(size)
        if found <= free or size == 1:
            return Fit(size, found, free)
        size -= 1


def free_bytes(device: torch.device, ranks_here: int) -> int:
    """Bytes that a rank may take: of its GPU, or its part of the host's or the container's."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * _SHARE)
    free = min([psutil.virtual_memory().available, *_of_the_group()])
    return int(free * _SHARE / ranks_here)


def _of_the_group() -> list[int]:
    """What is left of the limit that a container or a job has, if any (cgroup version 2 or 1)."""
    found = []
    for folder, limit, used in (
        ("/sys/fs/cgroup", "memory.max", "memory.current"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        try:
            most, now = (Path(folder, name).read_text().strip() for name in (limit, used))
        except OSError:  # no such version
            continue
        if most.isdecimal() and now.isdecimal():  # else "max"
            found.append(max(0, int(most) - int(now)))
    return found
