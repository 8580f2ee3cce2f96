"""Timing, the machine it was on, and files: what whoever measures has in common."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from psyche_fast.devices import indexed

DEVICE_ROUNDS = (5, 200)
HOST_ROUNDS = (3, 50)
PROFILED = 3
"""Calls that are profiled for the time of each kernel."""


def device_here() -> torch.device:
    """The GPU of this machine, with its index, or the CPU where there is none."""
    return indexed("cuda" if torch.cuda.is_available() else "cpu")


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """The 20th, 50th, 80th and 95th percentile."""
    ordered = sorted(values)
    return {f"p{p}": ordered[round(p / 100 * (len(ordered) - 1))] for p in (20, 50, 80, 95)}


def environment() -> dict[str, object]:
    """Hardware, versions and commit."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].split(":", 1)[1].strip() if names else cpu
    report: dict[str, object] = {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpu": None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "commit": _output("git", "describe", "--always", "--dirty", "--abbrev=40"),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        report |= {
            "gpu": torch.cuda.get_device_name(),
            "gpu_memory_gb": properties.total_memory / 1e9,
            "multiprocessors": properties.multi_processor_count,
            "l2_mb": properties.L2_cache_size / 1e6,
            "cuda": torch.version.cuda,
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }
    return report


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """What a command prints, None where there is no such command or it fails."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False
        )
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def milliseconds(
    call: Callable[[], object],
    device: torch.device,
    *,
    budget_ms: float = 200.0,
) -> list[float]:
    """Time a call again and again, after having it run once or more for warming up.

    On a GPU by its own events, each time with an L2 cache that holds nothing of use. What the host
    takes to launch counts where the GPU waits for it.

    Args:
        call: what is timed.
        device: where it runs.
        budget_ms: about how long all rounds together may take. 0 on a CPU: once, to see it run.
    """
    least, most = DEVICE_ROUNDS if device.type == "cuda" else HOST_ROUNDS
    if device.type != "cuda":
        if budget_ms == 0:
            return [_host_time(call)]
        call()
        times = [_host_time(call)]
        while len(times) < least or (len(times) < most and sum(times) < budget_ms):
            times.append(_host_time(call))
        return times
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    flushed = torch.empty(max(4 * l2, 256 << 20), dtype=torch.uint8, device=device)
    call()
    torch.cuda.synchronize(device)

    def whole() -> None:
        flushed.zero_()
        call()
        torch.cuda.synchronize(device)

    estimate = _host_time(whole)
    count = min(most, max(least, int(budget_ms / max(estimate, 1e-3))))
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for start, end in events:
        flushed.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) for start, end in events]


def _host_time(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written per second by a large copy, in GB/s: the roof for everything here."""
    size = (2 << 30) if device.type == "cuda" else (64 << 20)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    times = milliseconds(lambda: target.copy_(source), device)
    return 2 * size / percentiles(times)["p50"] / 1e6


def product_speed(device: torch.device) -> float:
    """GFLOP/s of a large product of matrices, float32 on a CPU, bfloat16 on a GPU."""
    side, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a, b = (torch.ones(side, side, dtype=dtype, device=device) for _ in range(2))
    times = milliseconds(lambda: a @ b, device)
    return 2 * side**3 / min(times) / 1e6


def device_times(call: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """What a call puts on the GPU, as the profiler sees it: kernels, copies and fills.

    Returns:
        "launches" of one call; "device_ms", how long they take together, without the gaps in which
        the GPU waits for the host; "kernels", the same by name. All None where the profiler has
        seen nothing, as on a CPU.
    """
    if device.type != "cuda":
        return {"launches": None, "device_ms": None, "kernels": None}
    call()
    torch.cuda.synchronize(device)
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        for _ in range(PROFILED):
            call()
        torch.cuda.synchronize(device)
    return summed(profile.events())


def summed(events: Iterable[Any]) -> dict[str, Any]:
    """`device_times` of the profiler's events of `PROFILED` calls."""
    kernels: dict[str, dict[str, float]] = {}
    for event in events:
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation:
            kernel = kernels.setdefault(event.name, {"launches": 0, "ms": 0.0})
            kernel["launches"] += 1 / PROFILED
            kernel["ms"] += event.time_range.elapsed_us() / 1e3 / PROFILED
    if not kernels:
        return {"launches": None, "device_ms": None, "kernels": None}
    return {
        "launches": round(sum(k["launches"] for k in kernels.values())),
        "device_ms": sum(k["ms"] for k in kernels.values()),
        "kernels": kernels,
    }


def write_json(path: Path, report: dict[str, Any]) -> None:
    """Write a report whole or not at all: a kill in between leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    part.replace(path)
