"""Which implementation of the kernels runs, and why."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import logging
import os
import sys
from types import ModuleType
from typing import Any

import torch

from psyche_fast.kernels.plan import ChunkPlan

log = logging.getLogger(__name__)

BACKENDS = ("triton", "torch", "interpret")
ENVIRONMENT = "PSYCHE_FAST_KERNELS"
MAX_SIDE = 64
"""Largest side of a chunk that the Triton kernels hold in registers and shared memory."""

_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def implementation(backend: str, operation: str) -> ModuleType:
    """The module of a resolved backend that implements an operation.

    Args:
        backend: "triton", "torch" or "interpret".
        operation: "encode", "apply", "accumulate" or "pack".
    """
    if backend == "interpret":
        importlib.import_module("psyche_fast.kernels.interpreter").repair()
    package = "reference" if backend == "torch" else "triton"
    return importlib.import_module(f"psyche_fast.kernels.{package}.{operation}")


def explain(device: torch.device, backend: str = "auto") -> tuple[str, str]:
    """Which backend runs on a device, and why.

    Args:
        device: where the parameters live.
        backend: "auto" or a backend's name. For "auto" the environment variable
            `PSYCHE_FAST_KERNELS` decides where it is set.

    Returns:
        The resolved name, and the reason in a few words.

    Raises:
        ValueError: no such backend, or it cannot run on the device.
    """
    asked, source = backend, f"backend={backend!r}"
    if backend == "auto" and os.environ.get(ENVIRONMENT, "auto") != "auto":
        asked = os.environ[ENVIRONMENT]
        source = f"{ENVIRONMENT}={asked}"
    if asked == "auto":
        if device.type != "cuda":
            return "torch", f"there are no Triton kernels for {device.type}"
        if importlib.util.find_spec("triton") is None:
            return "torch", "triton is not installed (pip install triton)"
        return "triton", "the device is a GPU"
    if asked not in BACKENDS:
        known = ", ".join(["auto", *BACKENDS])
        raise ValueError(f"{source}: backend must be one of {known}; got {asked!r}")
    if asked != "torch" and importlib.util.find_spec("triton") is None:
        raise ValueError(f"{source}: triton is not installed")
    if asked == "triton" and device.type != "cuda":
        raise ValueError(
            f"{source}: the Triton kernels need a CUDA device, the parameters are on {device}; "
            "'interpret' runs them on a CPU, slowly"
        )
    if asked == "interpret":
        _check_interpreter(source, device)
    return asked, f"{source} asks for it"


def resolve_backend(backend: str, device: torch.device | None = None) -> str:
    """Name of the backend that `backend` stands for on a device, the CPU where None.

    Raises:
        ValueError: as `explain`.
    """
    return explain(device or torch.device("cpu"), backend)[0]


def backend_of(plan: ChunkPlan, backend: str) -> tuple[str, str]:
    """Like `explain`, for one chunk class: some only the reference can handle.

    Where `"auto"` takes the reference on a GPU, a warning says so and why, once for each reason.

    Raises:
        ValueError: `backend`, or the environment, asks for kernels that cannot take this class.
    """
    name, reason = explain(plan.device, backend)
    automatic = backend == "auto" and os.environ.get(ENVIRONMENT, "auto") == "auto"
    if name != "torch":
        hindered = hindrance(plan.h, plan.w, plan.dtype, is_transformed=plan.is_transformed)
        if hindered is None:
            return name, reason
        if not automatic:
            raise ValueError(f"{reason}, but {hindered}")
        name, reason = "torch", hindered
    if automatic and plan.device.type == "cuda":
        _warn_of_reference(reason)
    return name, reason


def checked_backend(plan: ChunkPlan, backend: str) -> str:
    """The backend of `backend_of`, once its device has shown that it adds up integers exactly.

    Raises:
        ValueError: as `backend_of`; or it does not.
    """
    name, _ = backend_of(plan, backend)
    if plan.is_transformed:
        _check_products(plan.device, name)
    return name


@functools.cache  # once in a process
def _check_products(device: torch.device, backend: str) -> None:
    """Compare products of limbs (see `psyche_fast.integers`), random and largest, with int64."""
    products = implementation(backend, "apply").exact_products
    generator = torch.Generator().manual_seed(0)
    most = torch.tensor([512, 256]).view(2, 1, 1)
    for largest in (False, True):
        signs = 1 - 2 * torch.randint(2, (2, 2, 64, 64), generator=generator)
        sizes = torch.randint(513, signs.shape, generator=generator) % (most + 1)
        a, b = signs * most if largest else signs * sizes
        if largest:  # along one row and one column nothing cancels
            a[:, 0], b[..., 0] = most[:, 0], most[:, 0]
        wanted = (512 * (a[0] @ b[0]) + a[0] @ b[1] + a[1] @ b[0]).float()
        got = products(a.to(device, torch.float32), b.to(device, torch.float32)).cpu()
        wrong = int((got != wanted).sum())
        if wrong:
            raise ValueError(
                f"{device} (backend {backend!r}) gets {wrong} of 4096 sums of products of integers "
                "wrong, by which replicas decide signs: do not train with others on this device"
            )


def hindrance(h: int, w: int, dtype: torch.dtype, *, is_transformed: bool = True) -> str | None:
    """Why the Triton kernels cannot take chunks of `h` x `w`; None where they can.

    Args:
        h: rows.
        w: columns.
        dtype: of the parameters.
        is_transformed: whether chunks are, or are selected from as they are.
    """
    if dtype not in _TRITON_DTYPES:
        return f"parameters are {dtype}, the kernels take float32, bfloat16 and float16"
    if not is_transformed and h * w > MAX_SIDE**2:
        return f"chunks are {h} x {w}, the kernels take up to {MAX_SIDE**2} elements"
    if is_transformed and max(h, w) > MAX_SIDE:
        return f"chunks are {h} x {w}, the kernels take sides of up to {MAX_SIDE}"
    return None


def summary() -> dict[str, Any]:
    """Which kernels run on this machine, why, and in which versions.

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


def describe(machine: dict[str, Any]) -> list[str]:
    """What `summary` returned, as lines for a user."""
    return [
        f"kernels     {machine['backend']}: {machine['reason']}",
        f"device      {machine['device']}",
        f"versions    triton {machine['triton'] or 'none'}, torch {machine['torch']}",
    ]


@functools.cache  # once in a process
def _warn_of_reference(reason: str) -> None:
    log.warning("DisTrO's step runs in plain PyTorch, which is slow on a GPU: %s", reason)


def _check_interpreter(source: str, device: torch.device) -> None:
    if device.type != "cpu":
        raise ValueError(f"{source}: the interpreter runs on the CPU, the parameters on {device}")
    if "triton" not in sys.modules:
        os.environ["TRITON_INTERPRET"] = "1"
        return
    # Triton decides function by function, when each is defined, its own library's included.
    from triton import language
    from triton.runtime.jit import JITFunction

    if isinstance(language.sum, JITFunction):
        raise ValueError(
            f"{source}: triton was imported before its interpreter was asked for; set "
            "TRITON_INTERPRET=1 in the environment before Python starts"
        )
