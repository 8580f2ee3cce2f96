"""Which kernels run on this machine, why, and with what versions."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from typing import Any

import torch

from psyche_fast.kernels.backends import explain


def what_runs_here() -> dict[str, Any]:
    """What runs on this machine, and in which versions.

    Returns:
        `backend`, `reason`, `device`, `triton` (None where it is not installed) and `torch`.
    """
    cuda = torch.cuda.is_available()
    backend, reason = explain(torch.device("cuda" if cuda else "cpu"))
    name = "cpu"
    if cuda:
        major, minor = torch.cuda.get_device_capability()
        name = f"{torch.cuda.get_device_name()} (sm_{major}{minor}, CUDA {torch.version.cuda})"
    installed = importlib.util.find_spec("triton") is not None
    return {
        "backend": backend,
        "reason": reason,
        "device": name,
        "triton": importlib.metadata.version("triton") if installed else None,
        "torch": torch.__version__,
    }


def describe(here: dict[str, Any]) -> list[str]:
    """What `what_runs_here` returned, as lines for a user."""
    return [
        f"kernels     {here['backend']}: {here['reason']}",
        f"device      {here['device']}",
        f"versions    triton {here['triton'] or 'none'}, torch {here['torch']}",
    ]
