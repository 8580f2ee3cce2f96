"""Every kernel once on a GPU beside its twin on the CPU: the first thing to know of a new machine.

Both get the same numbers. Twins round like their kernels but for the order of some sums, so that
most results are the same bits; `differ` counts the elements that are not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from psyche_fast.bench.kernel_checks import RATE, members
from psyche_fast.bench.kernel_data import Data
from psyche_fast.bench.plain_demo import DECAY
from psyche_fast.bench.shapes import Shapes
from psyche_fast.kernels import accumulate as accumulation
from psyche_fast.kernels import apply as application
from psyche_fast.kernels import encode as encoding
from psyche_fast.kernels import pack as wire
from psyche_fast.kernels.plan import Entries

CPU = torch.device("cpu")
K, PEERS = 8, 16
# Enough chunks that every program of a large GPU has several tiles, the last of them not full.
TILES: dict[str, Shapes] = {"large": [(4096, 2048), (1984, 192)], "tiny": [(128, 64)]}
ROWS: dict[str, Shapes] = {"large": [(4099, 256), (2048,)], "tiny": [(67, 64)]}

# What a comparison allows: relative distance, or share of elements on the other side.
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 2.0**-8}
FLIPS = 2e-3
AGREEMENT = 0.99

Outcome = dict[str, Tensor]
Operation = Callable[[Data, str], Outcome]


def encode(data: Data, backend: str, *, delta: torch.dtype = torch.float32) -> Outcome:
    """State update, transform and selection, with a previous result taken out."""
    outcome: Outcome = {}
    gradients, states = data.tensors("gradient", torch.bfloat16, 1.0), data.state(delta)
    for number, (plan, state) in enumerate(zip(data.layout(K).plans, states, strict=True)):
        rates = [RATE] * len(plan.members)
        own = encoding.encode(
            plan, state, members(plan, gradients), rates, decay=DECAY, backend=backend,
            previous=data.entries(plan, 1, signs=False),
        )  # fmt: skip
        outcome |= {f"state {number}": state, f"entries {number}": dense(own, plan.totalk)}
    return outcome


def apply(data: Data, backend: str, *, signs: bool, ahead: bool) -> Outcome:
    """The mean of 16 peers' results, transformed back; with a look-ahead or without."""
    parameters = data.tensors("parameter", data.dtype, 0.01)
    targets = data.tensors("ahead", data.dtype, 0.01) if ahead else None
    for plan, state in zip(data.layout(K).plans, data.state(torch.float32), strict=True):
        application.apply(
            plan,
            members(plan, parameters),
            data.entries(plan, PEERS, signs=signs),
            [RATE] * len(plan.members),
            ahead=None if targets is None else members(plan, targets),
            delta=None if targets is None else state,
            backend=backend,
        )
    return _parameters([*parameters, *(targets or [])])


def subtract(data: Data, backend: str) -> Outcome:
    """The own result taken out of the state."""
    states = data.state(torch.float32)
    for plan, state in zip(data.layout(K).plans, states, strict=True):
        application.subtract(plan, state, data.entries(plan, 1, signs=False), backend=backend)
    return {f"state {number}": state for number, state in enumerate(states)}


def lookahead(data: Data, backend: str) -> Outcome:
    """A signed step along the state."""
    parameters = data.tensors("parameter", data.dtype, 0.01)
    targets = data.tensors("ahead", data.dtype, 0.01)
    for plan, state in zip(data.layout(K).plans, data.state(torch.float32), strict=True):
        application.lookahead(
            plan,
            members(plan, parameters),
            state,
            [RATE] * len(plan.members),
            members(plan, targets),
            backend=backend,
        )
    return _parameters(targets)


def accumulate(data: Data, backend: str, *, fresh: bool) -> Outcome:
    """Sums of gradients, the first or the last micro-batch's, and their squared norm."""
    sums = data.tensors("sum", torch.float32, 1.0)
    gradients = data.tensors("gradient", torch.bfloat16, 1.0)
    numels = tuple(g.numel() for g in gradients)
    plan = accumulation.plan_accumulation(numels, (0,) * len(numels), data.device)
    squares = accumulation.accumulate(
        plan, sums, gradients, [fresh] * len(sums), squares=not fresh, backend=backend
    )
    outcome = {f"state {number}": tensor for number, tensor in enumerate(sums)}
    return outcome if squares is None else {**outcome, "state squares": squares}


def squared_norms(data: Data, backend: str) -> Outcome:
    """Squared norms of gradients alone."""
    gradients = data.tensors("gradient", torch.bfloat16, 1.0)
    numels = tuple(g.numel() for g in gradients)
    plan = accumulation.plan_accumulation(numels, (0,) * len(numels), data.device)
    return {"state squares": accumulation.squared_norms(plan, gradients, backend=backend)}


def pack(data: Data, backend: str, *, signs: bool) -> Outcome:
    """The bytes of a message."""
    values: wire.Values = "sign" if signs else data.dtype
    return {
        f"bytes {number}": wire.pack(
            plan, data.entries(plan, 1, signs=signs), values, backend=backend
        )
        for number, plan in enumerate(data.layout(K).plans)
    }


def unpack(data: Data, backend: str, *, signs: bool) -> Outcome:
    """What 16 messages say, and whether they are well-formed."""
    values: wire.Values = "sign" if signs else data.dtype
    outcome: Outcome = {}
    for number, plan in enumerate(data.layout(K).plans):
        packed = wire.pack(plan, data.entries(plan, 1, signs=signs), values)
        rows = packed.expand(PEERS, -1).contiguous()
        entries, valid = wire.unpack_checked(plan, rows, values, backend=backend)
        outcome |= {
            f"bytes indices {number}": entries.indices.view(torch.uint8),
            f"bytes values {number}": entries.values,
            f"bytes valid {number}": valid,
        }
    return outcome


def dense(entries: Entries, totalk: int) -> Tensor:
    """Entries `[chunks, k]` in float32 on the CPU, spread over all coefficients of their chunk."""
    indices, values = entries.indices.cpu(), entries.values.float().cpu()
    wide = torch.zeros(len(indices), totalk)
    return wide.scatter_(1, indices.to(torch.int64), values)


def _parameters(tensors: list[Tensor]) -> Outcome:
    return {f"parameter {number}": tensor for number, tensor in enumerate(tensors)}


def _cases() -> Iterator[tuple[str, str, Operation]]:
    bf16 = partial(encode, delta=torch.bfloat16)
    for kind in ("tiles", "rows"):
        yield "encode", kind, encode
        yield "encode, bf16 delta", kind, bf16
        yield "apply", kind, partial(apply, signs=True, ahead=True)
        yield "apply, no look-ahead", kind, partial(apply, signs=False, ahead=False)
        yield "subtract", kind, subtract
        yield "lookahead", kind, lookahead
        for signs in (True, False):
            what = "signs" if signs else "values"
            yield f"pack, {what}", kind, partial(pack, signs=signs)
            yield f"unpack, {what}", kind, partial(unpack, signs=signs)
    yield "accumulate, first", "tiles", partial(accumulate, fresh=True)
    yield "accumulate, last, with squared norms", "tiles", partial(accumulate, fresh=False)
    yield "squared norms", "tiles", squared_norms


CASES = tuple(_cases())


def measure(
    kind: str, operation: Operation, device: torch.device, backend: str, *, tiny: bool
) -> dict[str, Any]:
    """Run an operation on a device and on the CPU; what differs."""
    shapes = {"tiles": TILES, "rows": ROWS}[kind]["tiny" if tiny else "large"]
    ours, twin = (
        operation(Data(shapes, where, torch.bfloat16, drawn_on=CPU), name)
        for where, name in ((device, backend), (CPU, "torch"))
    )
    return {"check": compare(ours, twin)}


def compare(ours: Outcome, twin: Outcome) -> dict[str, Any]:
    """Compare what two runs have made, by what each tensor is; the worst figures of all."""
    figures: dict[str, float] = {}
    good, differ, total = True, 0, 0
    for name, wanted in twin.items():
        got = ours[name].detach().cpu()
        kind, wide = name.split()[0], wanted.double()
        error, right = _error(kind, got.double(), wide, wanted.dtype)
        good &= right
        figures[kind] = max(figures.get(kind, 0.0), error)
        differ += int((got != wanted).sum())
        total += wanted.numel()
    return {
        "ok": good,
        "against": "the twin on the CPU",
        "differ": differ,
        "of": total,
        **figures,
    }


def _error(kind: str, got: Tensor, wanted: Tensor, dtype: torch.dtype) -> tuple[float, bool]:
    if kind == "bytes":
        share = float((got != wanted).double().mean())
        return share, share == 0
    if kind == "parameter":
        share = float((~((got - wanted).abs() <= 0.7 * RATE)).double().mean())
        return share, share <= FLIPS
    if kind == "entries":
        # Another choice between two coefficients that are all but equal is right as well.
        chosen = wanted != 0
        missing = float((chosen & (got == 0)).sum() / chosen.sum())
        both = chosen & (got != 0)
        distance = float((got - wanted)[both].norm() / wanted[both].norm().clamp(min=1e-30))
        return max(missing, distance), missing <= 1 - AGREEMENT and distance <= 2.0**-8
    distance = float((got - wanted).norm() / wanted.norm())
    return distance, distance <= CLOSE[dtype]


def line(record: dict[str, Any]) -> str:
    """One line of the table."""
    if "fault" in record:
        return f"{record['name']:<46} FAULT {record['fault']}"
    check = record["check"]
    figures = ", ".join(
        f"{key} {value:.1e}" for key, value in check.items() if isinstance(value, float)
    )
    verdict = "right" if check["ok"] else "WRONG"
    return f"{record['name']:<46} {verdict} {check['differ']:>8} of {check['of']} differ; {figures}"
