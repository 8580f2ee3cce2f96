"""A device has one name; and which one a group of processes talks from."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from psyche_fast import compat


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


def multiplies_bf16(device_type: str) -> bool:
    """Whether devices of a kind multiply matrices of bfloat16 as fast as of float32, or faster.

    Args:
        device_type: `cuda` or `cpu`; GPUs that are not here are taken for ones that do.
    """
    if device_type == "cuda":
        return not torch.cuda.is_available() or torch.cuda.get_device_capability() >= (8, 0)
    return compat.cpu_multiplies_bf16()


def working_dtype(param_dtype: str, master_dtype: str, device_type: str) -> str:
    """What `--param-dtype` stands for: `auto` for bfloat16, or float32 where that is emulated.

    Masters in bfloat16 want parameters that are no wider.
    """
    if param_dtype != "auto":
        return param_dtype
    narrow = master_dtype == "bfloat16" or multiplies_bf16(device_type)
    return "bfloat16" if narrow else "float32"


def message_for(group: dist.ProcessGroup, tensor: Tensor) -> Tensor:
    """A tensor where a group can send it from: where it is, but in host memory for gloo.

    A group may have a backend for each kind of device, as it has unless somebody chose one.
    """
    backends = backends_of(group)
    if tensor.device.type in backends and backends[tensor.device.type] != "gloo":
        return tensor
    return tensor.cpu() if "cpu" in backends else tensor.to(next(iter(backends)))


def backends_of(group: dist.ProcessGroup) -> dict[str, str]:
    """A group's backends by kind of device."""
    pairs = dist.get_backend_config(group).split(",")
    return {device: name for device, _, name in (pair.partition(":") for pair in pairs)}
