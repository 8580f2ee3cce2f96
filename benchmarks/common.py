"""What every script here shares: the package's own measuring, and faults that end no suite."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

import torch

from psyche_fast.bench.measure import (
    copy_bandwidth,
    device_here,
    device_times,
    environment,
    milliseconds,
    percentiles,
    summed,
    write_json,
)

__all__ = [
    "as_fault",
    "attempt",
    "copy_bandwidth",
    "device_here",
    "device_times",
    "environment",
    "milliseconds",
    "percentiles",
    "summed",
    "unusable",
    "write_json",
]


def attempt(
    call: Callable[[], dict[str, Any] | None], device: torch.device
) -> dict[str, Any] | None:
    """What a call returns, or "fault" and "trace" where it raises: the next case can still run.

    Raises:
        Exception: that of the call, where it has left the GPU unusable to this process: after an
            illegal address every further use fails.
    """
    try:
        return call()
    except Exception as error:
        if unusable(device):
            raise
        return as_fault(error)


def as_fault(error: Exception) -> dict[str, Any]:
    """The record of an exception."""
    text = str(error).strip().splitlines()
    first = f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
    return {"fault": first, "trace": "".join(traceback.format_exception(error))}


def unusable(device: torch.device) -> bool:
    """Whether an error that sticks to this process keeps it from using the GPU."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False
