"""A device has one name."""

from __future__ import annotations

import torch


def indexed(device: torch.device | str) -> torch.device:
    """The device by the one name that its tensors give it: `cuda:0` for `cuda`.

    torch takes `cuda` and `cuda:0`, and `cpu` and `cpu:0`, for different devices when they
    are compared. A GPU without an index is the current one; one with an index is not touched.

    Raises:
        RuntimeError, AssertionError: torch's, where there is no such device.
    """
    device = torch.device(device)
    if device.type == "cuda" and device.index is not None:
        return device
    return torch.empty(0, device=device).device
