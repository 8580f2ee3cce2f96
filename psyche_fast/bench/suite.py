"""The cases of `psyche-fast bench`, and how their times are taken.

Every case is come back to in several rounds, so that what else a machine does in one moment is
spread over all of them. Kernels and optimiser steps are compared with float64 first: nothing is
timed that has just been found wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from psyche_fast.bench import exchange, kernels, step_cases, training
from psyche_fast.bench.kernel_data import Data
from psyche_fast.bench.measure import (
    copy_bandwidth,
    device_times,
    environment,
    milliseconds,
    product_speed,
)
from psyche_fast.bench.shapes import SETS

GROUPS = ("kernel", "step", "exchange", "training")
ROUNDS = {"cpu": 3, "cuda": 1}
"""On a GPU a case's tensors are made for it alone, and the times hardly change."""
_ON_A_CPU = {
    "encode k=8", "encode k=32", "apply n=16, k=8, signs, look-ahead", "subtract k=8",
    "lookahead", "accumulate middle", "accumulate last", "codec pack k=8, signs",
    "codec unpack k=8, signs, n=16",
    "AdamW fused, fp32", "Distro k=8, through a message", "DeMo k=8",
}  # fmt: skip
"""Of the cases those that are measured where none is named: the others take minutes there."""


@dataclass
class Timed:
    """A case that is ready to be timed.

    Attributes:
        times: given about how many milliseconds it may take, those of each call.
        work: the bytes that it has to move at least, or its FLOPs.
        speed: GB/s or GFLOP/s at which the work takes least time, or the yardstick that says it: a
            copy (kernels, steps), the same link (exchange), a product (training).
        device_call: what the profiler is to see on a GPU; None where the host's time counts.
        about: more about it, for the file.
    """

    times: Callable[[float], Sequence[float]]
    work: float
    speed: float | str
    device_call: Callable[[], object] | None = None
    about: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """One line of the table.

    Attributes:
        group: of `GROUPS`.
        name: what tells it from others of its group.
        prepare: makes it ready; what is to be closed goes on the stack.
    """

    group: str
    name: str
    prepare: Callable[[ExitStack], Timed]

    @property
    def full_name(self) -> str:
        """Unique among all."""
        return f"{self.group}: {self.name}"


@dataclass
class Found:
    """What was measured of a case: milliseconds of each call, and what `Timed` says."""

    group: str
    name: str
    times: list[float]
    floor_ms: float
    about: dict[str, Any]

    @property
    def full_name(self) -> str:
        """As a case's."""
        return f"{self.group}: {self.name}"


@dataclass
class Report:
    """All that one run of the suite has found.

    Attributes:
        environment: machine, versions, commit, date.
        yardsticks: what is not ours, by name: GB/s of a copy, GFLOP/s of a product; the best seen.
        found: the cases, in order.
    """

    environment: dict[str, object]
    yardsticks: dict[str, float]
    found: list[Found]


def cases(layers: str, device: torch.device) -> Iterator[Case]:
    """All cases.

    Args:
        layers: a name of `SETS`: what kernels, steps and the exchange work on.
        device: where.
    """
    backend = "triton" if device.type == "cuda" else "torch"
    dtype = kernels.BF16 if device.type == "cuda" else kernels.FP32
    data = Data(SETS[layers], device, dtype)
    for kernel in kernels.CASES:
        yield Case("kernel", kernel.name, partial(_kernel, kernel, data, backend))
    for step in step_cases.CASES:
        if not step.name.startswith("plain"):
            prepare = partial(_step, step, layers, device, backend, dtype)
            yield Case("step", step.name, prepare)
    for name in exchange.CASES:
        yield Case("exchange", name, partial(_exchange, name, layers))
    for name in training.CASES:
        yield Case("training", name, partial(_training, name, device))


def _kernel(case: kernels.Case, data: Data, backend: str, stack: ExitStack) -> Timed:
    work = case.build(data, backend)
    _right(case.name, work.check(backend))
    call = work.calls[backend]
    about = {"bytes": work.bytes, "elements": data.elements, "backend": backend}
    times = partial(_milliseconds, call, data.device)
    return Timed(times, work.bytes, "copy_gb_per_s", call, about)


def _step(
    case: step_cases.StepCase,
    layers: str,
    device: torch.device,
    backend: str,
    dtype: torch.dtype,
    stack: ExitStack,
) -> Timed:
    _right(case.name, step_cases.check(case, SETS["tiny"], device, backend))
    dtype = case.dtype or dtype
    stepper = step_cases.Stepper(case, SETS[layers], device, backend, dtype)
    stack.callback(step_cases.release, device)
    size = case.bytes(SETS[layers], dtype)
    about = {"bytes": size, "dtype": str(dtype), "backend": backend}
    times = partial(_milliseconds, stepper.step, device)
    return Timed(times, size, "copy_gb_per_s", stepper.step, about)


def _exchange(name: str, layers: str, stack: ExitStack) -> Timed:
    pair = stack.enter_context(exchange.Pair(name, layers))
    about = {"bytes": pair.size, "link_gb_per_s": pair.gb_per_s}
    return Timed(pair.times, pair.size, pair.gb_per_s, None, about)


def _training(name: str, device: torch.device, stack: ExitStack) -> Timed:
    step = stack.enter_context(training.step(name, device))
    times = partial(_milliseconds, step.run, device)
    about = {"flops": step.flops, "tokens": step.tokens}
    return Timed(times, step.flops, "product_gflop_per_s", None, about)


def _milliseconds(call: Callable[[], object], device: torch.device, budget: float) -> list[float]:
    return milliseconds(call, device, budget_ms=budget)


def _right(name: str, check: dict[str, Any]) -> None:
    """Refuses to time what is wrong.

    Raises:
        RuntimeError: it is not what float64 says; nothing of it is measured.
    """
    if not check["ok"]:
        raise RuntimeError(f"{name} is wrong, so nothing is timed: {check}")


def chosen(every: Sequence[Case], texts: Sequence[str], device: torch.device) -> list[Case]:
    """Of all cases those that are asked for.

    Args:
        every: the cases.
        texts: those whose name has one of them; none for the usual ones.
        device: on a CPU the usual ones are fewer.

    Raises:
        ValueError: a text is in no name.
    """
    for text in texts:
        if not any(text in case.full_name for case in every):
            known = ", ".join(case.full_name for case in every)
            raise ValueError(f"--case {text!r} is in no case's name; there are: {known}")
    if texts:
        return [case for case in every if any(text in case.full_name for text in texts)]
    if device.type == "cuda":
        return list(every)
    return [c for c in every if c.group in ("exchange", "training") or c.name in _ON_A_CPU]


def yardsticks(device: torch.device) -> dict[str, float]:
    """The speed of a copy and of a product on a device, of float32 or on a GPU of bfloat16."""
    return {
        "copy_gb_per_s": copy_bandwidth(device),
        "product_gflop_per_s": product_speed(device),
    }


def measure(
    layers: str,
    device: torch.device,
    texts: Sequence[str],
    rounds: int | None,
    *,
    budget_ms: float,
    between: Callable[[], None] = lambda: None,
    tell: Callable[[str], None] = lambda line: None,
) -> Report:
    """Measures the cases that are asked for.

    Args:
        layers: a name of `SETS`.
        device: where.
        texts: as of `chosen`.
        rounds: how often each case is come back to; None for `ROUNDS`.
        budget_ms: about how long the calls of a case may take in a round.
        between: called before each round.
        tell: takes a line of what is going on.

    Raises:
        ValueError: a text is in no name.
        RuntimeError: a kernel or a step is wrong.
    """
    best: dict[str, float] = {}
    every = chosen(list(cases(layers, device)), texts, device)
    found: dict[str, Found] = {}
    with ExitStack() as kept:
        ready: dict[str, Timed] = {}
        for number in range(rounds or ROUNDS[device.type]):
            between()
            best = {n: max(s, best.get(n, 0.0)) for n, s in yardsticks(device).items()}
            for case in every:
                tell(f"round {number + 1}: {case.full_name}")
                name = case.full_name
                with ExitStack() as own:
                    timed = ready.get(name)
                    if timed is None:
                        timed = case.prepare(kept if device.type == "cpu" else own)
                    times = list(timed.times(budget_ms))
                    if name not in found:
                        about = dict(timed.about)
                        if timed.device_call is not None:
                            about |= device_times(timed.device_call, device)
                        found[name] = Found(case.group, case.name, [], 0.0, about)
                    found[name].times += times
                    speed = best[timed.speed] if isinstance(timed.speed, str) else timed.speed
                    found[name].floor_ms = timed.work / speed / 1e6
                    if device.type == "cpu":
                        ready[name] = timed
    return Report(environment(), best, list(found.values()))
