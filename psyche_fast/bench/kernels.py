"""Every kernel as it is measured: cases, and what is found of one of its implementations."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from psyche_fast.bench import kernel_cases as make
from psyche_fast.bench import method_cases as methods
from psyche_fast.bench.kernel_data import Data, Work
from psyche_fast.bench.measure import device_times, milliseconds, percentiles

BF16, FP32 = torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Case:
    """One kernel on one kind of data.

    Attributes:
        kernel: its name.
        variant: what else tells the case from others.
        build: makes the work from data and the backend's name.
        target: microseconds per million elements on an H200 that the project aims at.
        quick: part of a dry run.
    """

    kernel: str
    variant: str
    build: Callable[[Data, str], Work]
    target: float | None = None
    quick: bool = False

    @property
    def name(self) -> str:
        """As it is shown."""
        return f"{self.kernel} {self.variant}".rstrip()


def _cases() -> Iterator[Case]:
    target: float | None
    targets = {4: 2.9, 8: 2.9, 32: 3.4, 64: 4.5}
    for k, target in targets.items():
        build = partial(make.encode, k=k)
        yield Case("encode", f"k={k}", build, target, quick=k == 8)
    fp32 = partial(make.encode, k=8, gradient=FP32)
    yield Case("encode", "k=8, fp32 gradient", fp32)
    for k in (8, 32):
        bf16 = partial(make.encode, k=k, delta=BF16)
        yield Case("encode", f"k={k}, bf16 delta", bf16, targets[k], quick=k == 8)
    for peers in (4, 16, 64):
        for signs in (True, False):
            build = partial(make.apply, peers=peers, signs=signs)
            what = f"n={peers}, k=8, {'signs' if signs else 'values'}"
            target = 2.0 if peers == 16 else None
            yield Case("apply", f"{what}, look-ahead", build, target, quick=peers == 4)
    plain = partial(make.apply, peers=16, signs=True, look_ahead=False)
    yield Case("apply", "n=16, k=8, signs", plain)
    wide = partial(make.apply, peers=16, signs=True, k=32)
    yield Case("apply", "n=16, k=32, signs, look-ahead", wide)
    yield Case("subtract", "k=8", make.subtract, quick=True)
    yield Case("lookahead", "", make.lookahead, quick=True)
    for which in ("first", "middle", "last"):
        target = 2.6 if which != "first" else None
        build = partial(make.accumulate, which=which)
        yield Case("accumulate", which, build, target, quick=True)
    for direction in ("pack", "unpack"):
        for signs in (True, False):
            build = partial(make.codec, direction=direction, signs=signs)
            senders = f", n={make.PEERS}" if direction == "unpack" else ""
            what = f"{direction} k=8, {'signs' if signs else 'values'}{senders}"
            yield Case("codec", what, build, quick=signs)
    yield Case("cross entropy", "and its gradient", make.cross_entropy, quick=True)
    yield Case("take up", "k=64 of anchor - own", partial(methods.take_up, k=64), quick=True)
    for bits in (2, 4, 8):
        build = partial(methods.take_up, bits=bits)
        yield Case("take up", f"all in {bits} bits of anchor - own", build, quick=bits == 4)
    for k, replicas in ((64, 8), (0, 1)):
        build = partial(methods.outer_step, replicas=replicas, k=k)
        what = f"n={replicas}, {f'k={k}' if k else 'all'}, Nesterov and copy"
        yield Case("outer", what, build, quick=k == 0)


CASES = tuple(_cases())


def measure(
    case: Case,
    data: Data,
    work: Work,
    implementation: str,
    *,
    copy_gb_per_s: float,
    budget_ms: float = 200.0,
) -> dict[str, Any]:
    """Check and then time one implementation.

    Returns:
        What was found, for JSON; without times where the check failed. The speed goes by the time
        of the kernels on the GPU where the profiler has seen them ("device_ms"), else by "ms".
    """
    elements = work.elements or data.elements
    record: dict[str, Any] = {
        "dtype": str(data.dtype),
        "kernel": case.kernel,
        "variant": case.variant,
        "implementation": implementation,
        "elements": elements,
        "bytes": work.bytes,
        "bytes_per_element": work.bytes / elements,
        "floor_ms": work.bytes / copy_gb_per_s / 1e6,
        "target_us_per_million": case.target,
        "check": work.check(implementation),
    }
    if not record["check"]["ok"]:
        return record
    call = work.calls[implementation]
    record["ms"] = percentiles(milliseconds(call, data.device, budget_ms=budget_ms))
    record |= device_times(call, data.device)
    taken = record["device_ms"] or record["ms"]["p50"]
    return record | {
        "us_per_million": 1e9 * taken / elements,
        "gb_per_s": work.bytes / taken / 1e6,
        "copy_fraction": record["floor_ms"] / taken,
    }


def kernel_backend(device: torch.device) -> str | None:
    """Name of the backend that runs the kernels here, if any does."""
    if device.type == "cuda":
        return "triton"
    return "interpret" if os.environ.get("TRITON_INTERPRET") == "1" else None


def one(
    case: Case,
    data: Data,
    implementation: str,
    *,
    copy_gb_per_s: float,
    budget_ms: float = 200.0,
) -> dict[str, Any] | None:
    """Build a case and measure one implementation; None where the case has none of that name."""
    work = case.build(data, kernel_backend(data.device) or "torch")
    if implementation not in work.calls:
        return None
    return measure(
        case, data, work, implementation, copy_gb_per_s=copy_gb_per_s, budget_ms=budget_ms
    )
