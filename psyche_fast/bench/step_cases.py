"""Whole optimiser steps: AdamW, SGD, the plain DeMo, and ours."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from psyche_fast.bench.measure import device_times, milliseconds, percentiles
from psyche_fast.bench.plain_demo import PlainDeMo
from psyche_fast.bench.shapes import SETS, Shapes, elements
from psyche_fast.distro import DeMo, DistroStep
from psyche_fast.distro.message import MessageFormat
from psyche_fast.kernels.plan import Entries

RATE = 4e-4
DECAY = 0.999
WEIGHT_DECAY = 0.1
BF16, FP32 = torch.bfloat16, torch.float32

Step = Callable[[], object]


class DistroLoop:
    """`DistroStep` as a train step uses it, without the model in between; nothing waits.

    With `message` what is applied has travelled: it is packed, then checked and unpacked,
    which waits once.
    """

    def __init__(
        self,
        parameters: list[Tensor],
        *,
        message: bool = False,
        **options: Any,
    ) -> None:
        self.distro = DistroStep(
            {f"{i:04}": p for i, p in enumerate(parameters)},
            compression_decay=DECAY,
            compression_chunk=64,
            weight_decay=WEIGHT_DECAY,
            **options,
        )
        self.own: list[Entries] | None = None
        # As in `train`, which knows from the norm that gradients are finite.
        self._scale = torch.ones((), device=parameters[0].device)
        self._format = None
        if message:
            self._format = MessageFormat(self.distro.layout, self.distro.backends, signs=False)

    def step(self) -> None:
        """One step, with the own result as the only peer's."""
        self.distro.look_ahead(RATE)
        new = self.distro.compress(self.own, RATE, grad_scale=self._scale)
        self.distro.update(new if self._format is None else self._sent(self._format, new), RATE)
        self.own = new

    def _sent(self, form: MessageFormat, entries: list[Entries]) -> list[Entries]:
        received, faults = form.unpack(form.pack(entries)[None])
        if received is None:
            raise RuntimeError(f"the own message is refused: {faults}")
        return received


@dataclass(frozen=True)
class StepCase:
    """One optimiser.

    Attributes:
        name: as it is shown.
        build: from parameters and a backend's name to a function that takes a step, and one that
            makes the parameters plain ones.
        accesses: the least that has to be done for an element: reads and writes of numbers in the
            parameters' dtype.
        state_bytes: and bytes read and written of state in another dtype.
        dtype: of parameters and gradients, None where it is for the caller to say.
        ours: whether it is of this project, and checked against the plain one in float64.
        quick: part of a dry run.
    """

    name: str
    build: Callable[[list[Tensor], str], tuple[Step, Step]]
    accesses: int
    state_bytes: int
    dtype: torch.dtype | None = None
    ours: bool = False
    quick: bool = True

    def bytes(self, shapes: Shapes, dtype: torch.dtype) -> int:
        """The least that a step on parameters of a dtype has to read and write."""
        return (self.accesses * dtype.itemsize + self.state_bytes) * elements(shapes)


def _adamw(parameters: list[Tensor], backend: str) -> tuple[Step, Step]:
    del backend
    optimizer = torch.optim.AdamW(
        parameters, RATE, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY, fused=True
    )
    return optimizer.step, lambda: None


def _sgd(parameters: list[Tensor], backend: str) -> tuple[Step, Step]:
    del backend
    optimizer = torch.optim.SGD(parameters, RATE, fused=True)
    return optimizer.step, lambda: None


def _plain(k: int) -> Callable[[list[Tensor], str], tuple[Step, Step]]:
    def build(parameters: list[Tensor], backend: str) -> tuple[Step, Step]:
        del backend
        return PlainDeMo(parameters, RATE, k).step, lambda: None

    return build


def _demo(k: int) -> Callable[[list[Tensor], str], tuple[Step, Step]]:
    def build(parameters: list[Tensor], backend: str) -> tuple[Step, Step]:
        optimizer = DeMo(parameters, RATE, DECAY, k, 64, weight_decay=WEIGHT_DECAY, backend=backend)
        return optimizer.step, lambda: None

    return build


def _distro(k: int, **options: Any) -> Callable[[list[Tensor], str], tuple[Step, Step]]:
    def build(parameters: list[Tensor], backend: str) -> tuple[Step, Step]:
        loop = DistroLoop(parameters, compression_topk=k, backend=backend, **options)
        return loop.step, loop.distro.plain

    return build


# Distro reads the gradient and writes the look-ahead; it reads and writes the master copy, in
# float32, and reads delta twice and writes it once. DeMo has neither master copy nor look-ahead.
CASES = (
    StepCase("AdamW fused, fp32", _adamw, 7, 0, FP32),
    StepCase("AdamW fused, bf16", _adamw, 7, 0, BF16),
    StepCase("SGD fused", _sgd, 3, 0),
    StepCase("Distro k=8", _distro(8), 2, 20, ours=True, quick=False),
    StepCase("Distro k=32", _distro(32), 2, 20, ours=True, quick=False),
    StepCase(
        "Distro k=8, bf16 delta", _distro(8, delta_dtype=BF16), 2, 14, ours=True, quick=False
    ),
    StepCase("Distro k=8, through a message", _distro(8, message=True), 2, 20, ours=True),
    StepCase("DeMo k=8", _demo(8), 3, 8, ours=True),
    StepCase("DeMo k=32", _demo(32), 3, 8, ours=True, quick=False),
    StepCase("plain DeMo k=8", _plain(8), 5, 0),
    StepCase("plain DeMo k=32", _plain(32), 5, 0, quick=False),
)  # fmt: skip


class Stepper:
    """An optimiser on parameters of its own, with gradients that stay as they are."""

    def __init__(
        self,
        case: StepCase,
        shapes: Shapes,
        device: torch.device,
        backend: str,
        dtype: torch.dtype,
    ) -> None:
        generator = torch.Generator(device).manual_seed(0)
        options: dict[str, Any] = {"dtype": dtype, "device": device}
        self.parameters = [
            torch.empty(s, **options).normal_(0, 0.02, generator=generator).requires_grad_()
            for s in shapes
        ]
        for p in self.parameters:
            p.grad = torch.empty_like(p).detach().normal_(0, 1, generator=generator)
        self.step, self.plain = case.build(self.parameters, backend)


def check(case: StepCase, shapes: Shapes, device: torch.device, backend: str) -> dict[str, Any]:
    """Three float32 steps of one of our optimisers against the plain formulation in float64.

    Returns:
        "ok" and the share of elements that have ended elsewhere: a selection that hangs on the last
        bit of two coefficients turns some of a chunk's signs. "ok" alone for what is not ours.
    """
    if not case.ours:
        return {"ok": True, "against": "nothing: it is what others are compared with"}
    ours = Stepper(case, shapes, device, backend, FP32)
    wide = [p.detach().double().requires_grad_() for p in ours.parameters]
    for p, own in zip(wide, ours.parameters, strict=True):
        p.grad = own.grad.double() if own.grad is not None else None
    plain = PlainDeMo(wide, RATE, 32 if "k=32" in case.name else 8)
    for _ in range(3):
        ours.step()
        with torch.no_grad():
            torch._foreach_mul_(wide, 1 - RATE * WEIGHT_DECAY)
        plain.step()
    ours.plain()
    off = [
        int(((p.double() - q).abs() > 0.1 * RATE).sum())
        for p, q in zip(ours.parameters, wide, strict=True)
    ]
    share = sum(off) / elements(shapes)
    # A delta that is rounded to bf16 orders about one chunk's entries in twenty otherwise.
    limit = 6e-2 if "bf16 delta" in case.name else 2e-3
    return {"ok": share <= limit, "against": "plain DeMo in float64, 3 steps", "flips": share}


def measure(
    case: StepCase,
    layers: str,
    device: torch.device,
    backend: str,
    *,
    dtype: torch.dtype,
    copy_gb_per_s: float,
    budget_ms: float = 400.0,
    checked_on: str = "small",
) -> dict[str, Any]:
    """Check and then time one optimiser.

    Returns:
        What was found, for JSON; without times where the check failed. Memory counts parameters,
        gradients and state; the peak has the step's temporary memory too.
    """
    shapes = SETS[layers]
    dtype = case.dtype or dtype
    least = case.bytes(shapes, dtype)
    record: dict[str, Any] = {
        "name": case.name,
        "set": layers,
        "dtype": str(dtype),
        "elements": elements(shapes),
        "bytes_per_element": least / elements(shapes),
        "floor_ms": least / copy_gb_per_s / 1e6,
        "check": check(case, SETS[checked_on], device, backend),
    }
    if not record["check"]["ok"]:
        return record
    release(device)
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    stepper = Stepper(case, shapes, device, backend, dtype)
    record["ms"] = percentiles(milliseconds(stepper.step, device, budget_ms=budget_ms))
    record |= device_times(stepper.step, device)
    record["floor_fraction"] = record["floor_ms"] / (record["device_ms"] or record["ms"]["p50"])
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        stepper.step()
        torch.cuda.synchronize(device)
        record["gb_held"] = (torch.cuda.memory_allocated(device) - before) / 1e9
        record["gb_peak"] = (torch.cuda.max_memory_allocated(device) - before) / 1e9
    del stepper
    release(device)
    return record


def release(device: torch.device) -> None:
    """Give back memory of what is no longer used."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


HEADER = (
    f"{'optimiser step':<42} {'p20 ms':>9} {'p50 ms':>9} {'p80 ms':>9} {'floor ms':>9} "
    f"{'launches':>8} {'GB held':>8} {'GB peak':>8}"
)


def line(record: dict[str, Any]) -> str:
    """One line of the table."""
    if "fault" in record:
        return f"{record['name']:<42} FAULT {record['fault']}"
    if "ms" not in record:
        return f"{record['name']:<42} WRONG {record['check']}"
    times = " ".join(f"{record['ms'][p]:9.3f}" for p in ("p20", "p50", "p80"))
    held = " ".join(
        f"{record[key]:8.2f}" if key in record else "" for key in ("gb_held", "gb_peak")
    )
    rest = f"{record['floor_ms']:9.3f} {record['launches'] or '':>8} {held}"
    return f"{record['name']:<42} {times} {rest}"
