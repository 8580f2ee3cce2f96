"""Memory of this process and of its GPU, in bytes."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    import torch


def _peak_resident_bytes() -> int:
    """Returns the largest resident size this process has had.

    On Linux it is read from `VmHWM`: `ru_maxrss` survives `exec`, so that a small sidecar started
    by a large process would report its parent's peak as its own.
    """
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def memory_bytes(device: torch.device | str | None = None) -> dict[str, int]:
    """Returns what this process holds, in bytes.

    Args:
        device: The device it trains on. For a CUDA device its allocator's peaks are added; these
            are read without waiting for the device, and are not reset here.

    Returns:
        `process` (resident now) and `process_peak`; on CUDA also `cuda_peak_allocated` (tensors)
        and `cuda_peak_reserved` (what the caching allocator took from the driver).
    """
    resident = psutil.Process().memory_info().rss
    # The kernel updates the two at different moments; a peak below the present is no peak.
    memory = {"process": resident, "process_peak": max(resident, _peak_resident_bytes())}
    if device is not None and str(device).startswith("cuda"):
        import torch

        memory["cuda_peak_allocated"] = torch.cuda.max_memory_allocated(device)
        memory["cuda_peak_reserved"] = torch.cuda.max_memory_reserved(device)
    return memory
