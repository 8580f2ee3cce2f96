"""Torch and what it was built for, flash attention, process groups. Runs in the trial's process."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta
from importlib import import_module, metadata
from typing import Any

from psyche_fast.devices import multiplies_bf16
from psyche_fast.doctor import gpus
from psyche_fast.doctor.finding import Finding, described, ok, problem, warning

_LEAST = (7, 5)
"""The oldest GPUs that Triton compiles for."""
_BF16 = (8, 0)
"""The oldest with bfloat16, which parameters have by default where it is."""
_TIMEOUT = timedelta(seconds=20)
_OTHER_BUILD = "pip install torch --force-reinstall --index-url https://download.pytorch.org/whl/"


def builds(torch: Any, driver: gpus.Driver) -> Iterator[Finding]:
    """Whether this torch is built for this machine.

    Args:
        torch: the module.
        driver: what `nvidia-smi` says.
    """
    version, cuda = str(torch.__version__), torch.version.cuda
    built = f"{version}, " + (f"for CUDA {cuda}" if cuda else "for the CPU alone")
    if getattr(torch.version, "hip", None):
        yield warning(
            "torch",
            f"{version}, for ROCm {torch.version.hip}",
            "AMD's GPUs have not been tried; CUDA's and CPUs are",
        )
        return
    if cuda is None:
        if driver.gpus:
            newest = "" if driver.cuda is None else "cu" + "".join(map(str, driver.cuda))
            yield problem(
                "torch",
                f"{built}, on a machine with a GPU: runs would take the CPU",
                f"{_OTHER_BUILD}{newest} (or the nearest older cu there)",
            )
        else:
            yield ok("torch", built)
        return
    wanted = gpus.numbers(cuda)
    if driver.cuda is not None and wanted is not None and wanted[0] > driver.cuda[0]:
        # Within one major version newer ones run on older drivers.
        newest = ".".join(map(str, driver.cuda))
        yield problem(
            "torch",
            f"{built}; the driver {driver.version} is for CUDA {newest} at most",
            f"update the driver, or {_OTHER_BUILD}cu{newest.replace('.', '')}",
        )
        return
    if not torch.cuda.is_available():
        if not driver.gpus and not gpus.is_there():
            yield ok("torch", f"{built}; no GPU here")
            return
        if os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1"):
            return  # which the driver's check has said
        try:
            torch.cuda.init()
            reason = "it does not say why"
        except Exception as error:  # torch's own words
            reason = str(error).splitlines()[0]
        yield problem(
            "torch",
            f"{built}, does not find the GPU: {reason}",
            "after an update of the driver restart the machine; in a container: "
            "docker run --gpus all; else install torch anew",
        )
        return
    yield ok("torch", built)
    yield from _capabilities(torch)
    yield from _copies(torch)


def processor(torch: Any) -> Iterator[Finding]:
    """Which products the CPU has, where runs take it."""
    if torch.cuda.is_available():
        return
    name = torch.backends.cpu.get_cpu_capability()
    if multiplies_bf16("cpu"):
        yield ok("CPU", f"{name}, with products of bfloat16")
    else:
        yield ok("CPU", f"{name}; torch emulates bfloat16: parameters are float32 unless asked")


def _capabilities(torch: Any) -> Iterator[Finding]:
    """Whether there is code for each GPU."""
    compiled = torch.cuda.get_arch_list()
    for index in range(torch.cuda.device_count()):
        capability = tuple(torch.cuda.get_device_capability(index))
        said = f"{torch.cuda.get_device_name(index)} is sm_{capability[0]}{capability[1]}"
        # Code for 8.0 runs on 8.6, and what is kept as PTX is translated for later GPUs.
        runs = [
            name
            for name in compiled
            if (
                name.startswith("sm_") and _of(name)[0] == capability[0] and _of(name) <= capability
            )
            or (name.startswith("compute_") and _of(name) <= capability)
        ]
        if compiled and not runs:
            yield problem(
                f"GPU {index}",
                f"{said}; this torch is built for {', '.join(compiled)}",
                "install a torch that has it: a newer one, or of another CUDA",
            )
        elif capability < _LEAST:
            yield problem(
                f"GPU {index}",
                f"{said}: too old for Triton",
                "use a GPU of sm_75 or later, or --device cpu",
            )
        elif capability < _BF16:
            yield warning(
                f"GPU {index}",
                f"{said}: bfloat16 is emulated, slowly; parameters are float32 unless asked",
                "a GPU of sm_80 or later",
            )
        else:
            yield ok(f"GPU {index}", said)


def _of(name: str) -> tuple[int, int]:
    digits = "".join(c for c in name.partition("_")[2] if c.isdecimal())
    return int(digits[:-1]), int(digits[-1])


def _copies(torch: Any) -> Iterator[Finding]:
    """Whether what one GPU gives another arrives: some boards' IOMMU spoils it."""
    count = torch.cuda.device_count()
    if count < 2:
        return
    sent = torch.arange(1 << 20, device="cuda:0")
    for index in range(1, count):
        if not torch.equal(sent.to(f"cuda:{index}").cpu(), sent.cpu()):
            yield problem(
                "links",
                f"what GPU 0 sends GPU {index} arrives changed",
                "turn off the IOMMU or PCIe's ACS in the firmware, or NCCL_P2P_DISABLE=1",
            )
            return
    direct = sum(torch.cuda.can_device_access_peer(0, index) for index in range(1, count))
    if direct < count - 1:
        yield warning(
            "links",
            f"GPU 0 reaches {direct} of {count - 1} others directly",
            "turn on peer access in the firmware, or expect the host's memory between",
        )
    else:
        yield ok("links", f"GPU 0 reaches all {count - 1} others directly")


def flash_attention() -> Iterator[Finding]:
    """Whether flash attention is there and loads."""
    name = "flash-attention"
    try:
        version = metadata.version("flash-attn")
    except metadata.PackageNotFoundError:
        yield ok(name, "not installed: attention is PyTorch's own (sdpa), which has flash kernels")
        return
    try:
        import_module("flash_attn")
    except Exception as error:  # ImportError of a missing symbol, mostly
        yield problem(
            name,
            f"{version} does not load: {described(error)}",
            "it was built for another "
            "torch: pip install --no-build-isolation --force-reinstall flash-attn, or "
            "uninstall it",
        )
        return
    yield ok(name, version)


def communication() -> Iterator[Finding]:
    """The store, gloo and, on a GPU, NCCL: each by a sum of one rank."""
    import torch
    import torch.distributed as dist

    from psyche_fast.start import network
    from psyche_fast.start.store import host_store

    network.check_interfaces()
    network.use_interface("127.0.0.1")
    sock = network.listen("127.0.0.1", 0)
    with closing(sock):
        store = host_store(sock, 1, _TIMEOUT)
    kinds = [("gloo", torch.device("cpu"))]
    if torch.cuda.is_available():
        version = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
        yield ok("NCCL", version)
        kinds.append(("nccl", torch.device("cuda", 0)))
    else:
        yield ok("NCCL", "not wanted: no GPU")
    for backend, device in kinds:
        began = time.perf_counter()
        dist.init_process_group(
            backend, store=dist.PrefixStore(backend, store), rank=0, world_size=1, timeout=_TIMEOUT
        )
        try:
            numbers = torch.ones(1024, device=device)
            dist.all_reduce(numbers)
            right = bool((numbers == 1).all())
        finally:
            dist.destroy_process_group()
        seconds = time.perf_counter() - began
        if right:
            yield ok(backend, f"starts and sums, in {seconds:.2g} s")
        else:
            yield problem(backend, "a sum of one rank is not what was summed", "install torch anew")
