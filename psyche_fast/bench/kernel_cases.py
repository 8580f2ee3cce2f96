"""What `bench_kernels.py` measures: every kernel with its twin and the plain formulation.

A case works on all parameters of a layer set. Before an implementation is timed it runs once and is
compared with float64 on some chunks of every class.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from psyche_fast.bench.kernel_checks import (
    RATE,
    chosen,
    decoded,
    distance,
    flipped,
    members,
    of_entries,
    of_parameters,
    of_state,
    selection,
    verdict,
    worst,
)
from psyche_fast.bench.kernel_data import Data, Work, entry_bytes
from psyche_fast.bench.plain_demo import DECAY, PlainDeMo
from psyche_fast.kernels import accumulate as accumulation
from psyche_fast.kernels import apply as application
from psyche_fast.kernels import encode as encoding
from psyche_fast.kernels import pack as wire
from psyche_fast.kernels.cross_entropy import cross_entropy as loss_and_gradient
from psyche_fast.kernels.plan import Entries

PEERS = 16
"""Whose results `codec` unpacks."""


def encode(
    data: Data,
    backend: str,
    *,
    k: int,
    delta: torch.dtype = torch.float32,
    gradient: torch.dtype = torch.bfloat16,
) -> Work:
    """State update with the own previous result taken out, transform, selection."""
    plans = data.layout(k).plans
    gradients = data.tensors("gradient", gradient, 1.0)
    deltas = data.state(delta)
    previous = [data.entries(plan, 1, signs=False) for plan in plans]

    def run(name: str) -> list[Entries]:
        results = []
        for plan, state, own in zip(plans, deltas, previous, strict=True):
            rates = [RATE] * len(plan.members)
            given = members(plan, gradients)
            results.append(
                encoding.encode(plan, state, given, rates, decay=DECAY, previous=own, backend=name)
            )
        return results

    def check(name: str) -> dict[str, Any]:
        data.renew(deltas)
        found = []
        befores = [
            DECAY * (of_state(plan, state) - decoded(plan, *of_entries(plan, own)))
            + RATE * of_parameters(plan, members(plan, gradients))
            for plan, state, own in zip(plans, deltas, previous, strict=True)
        ]
        for plan, state, exact, own in zip(plans, deltas, befores, run(name), strict=True):
            after = of_state(plan, state)
            loss = 2.0**-9 if delta == torch.bfloat16 else 0.0
            figures = {"state": max(0.0, distance(after, exact) - loss)}
            found.append(figures | selection(plan, after, *of_entries(plan, own)))
        return verdict(name, worst(found))

    least = data.elements * (gradient.itemsize + 2 * delta.itemsize)
    least += sum(2 * entry_bytes(p, p.k, False) + 16 * p.chunks for p in plans)
    work = Work({n: partial(run, n) for n in (backend, "torch")}, check, least)
    return _with_plain_encode(work, data, k, gradients)


def _with_plain_encode(work: Work, data: Data, k: int, gradients: list[Tensor]) -> Work:
    """Adds what the reference DeMo does, which takes its own result out at once."""
    plain = PlainDeMo(data.tensors("parameter", data.dtype, 0.01), RATE, k)
    for state in plain.delta:
        data.fill(state, RATE)

    def run() -> list[tuple[Tensor, Tensor]]:
        results = []
        for state, gradient in zip(plain.delta, gradients, strict=True):
            state.mul_(DECAY).add_(gradient, alpha=RATE)
            index, value, shape = plain.compress(plain.encode(state))
            state.sub_(plain.decode(plain.scatter(index, value, shape)).view_as(state))
            results.append((index, value))
        return results

    def check(name: str) -> dict[str, Any]:
        if name != "plain":
            return ours(name)
        data.renew(plain.delta)
        plans = data.layout(k).plans
        befores = [
            DECAY * of_parameters(plan, members(plan, plain.delta))
            + RATE * of_parameters(plan, members(plan, gradients))
            for plan in plans
        ]
        results, found = run(), []
        for plan, exact in zip(plans, befores, strict=True):
            own = [results[m.position] for m in plan.members]
            ids = chosen(plan).to(data.device)
            index, value = (
                torch.cat([o[i].flatten(0, -2) for o in own])[ids].cpu() for i in (0, 1)
            )
            after = of_parameters(plan, members(plan, plain.delta))
            sent = decoded(plan, index, value.double())
            error = distance(after + sent, exact)
            found.append({"state": error} | selection(plan, exact, index, value.double()))
        return verdict(name, worst(found))

    ours = work.check
    return Work({**work.calls, "plain": run}, check, work.bytes)


def apply(
    data: Data,
    backend: str,
    *,
    peers: int,
    signs: bool,
    k: int = 8,
    look_ahead: bool = True,
) -> Work:
    """Peers' results to the mean, decode, signed step; with a look-ahead of a master in float32."""
    plans = data.layout(k).plans
    kept = torch.float32 if look_ahead else data.dtype
    parameters = data.tensors("master" if look_ahead else "parameter", kept, 0.01)
    deltas = data.state(torch.float32)
    copies = data.tensors("ahead", data.dtype, 0.01) if look_ahead else None
    sent = [data.entries(plan, peers, signs=signs) for plan in plans]

    def run(name: str) -> None:
        for plan, state, entries in zip(plans, deltas, sent, strict=True):
            application.apply(
                plan,
                members(plan, parameters),
                entries,
                [RATE] * len(plan.members),
                ahead=None if copies is None else members(plan, copies),
                delta=None if copies is None else state,
                backend=name,
            )

    def run_plain() -> None:
        for plan, entries in zip(plans, sent, strict=True):
            for m in plan.members:
                p, own = parameters[m.position], slice(m.start, m.start + m.count)
                lead = m.lead if plan.h == 1 and p.dim() == 1 else (*m.lead, plan.h)
                index = entries.indices[own].long().view(*m.lead, -1)
                value = entries.values[own].view(*m.lead, -1)
                value = 1 - 2 * value.to(p.dtype) if signs else value.to(p.dtype)
                dense = plain.scatter(index, value, torch.Size((*lead, plan.w)))
                p.sub_(plain.decode(dense).view_as(p).sign_(), alpha=RATE)

    def check(name: str) -> dict[str, Any]:
        data.renew(parameters)
        befores = [of_parameters(plan, members(plan, parameters)) for plan in plans]
        calls[name]()
        found = []
        for plan, before, state, entries in zip(plans, befores, deltas, sent, strict=True):
            step = before - RATE * decoded(plan, *of_entries(plan, entries)).sign()
            after = of_parameters(plan, members(plan, parameters))
            figures = {"flips": flipped(after, step)}
            if copies is not None and name != "plain":
                looked = of_parameters(plan, members(plan, copies))
                ahead = after - RATE * of_state(plan, state).sign()
                figures["flips"] = max(figures["flips"], flipped(looked, ahead))
            found.append(figures)
        return verdict(name, worst(found))

    calls: dict[str, Callable[[], Any]] = {n: partial(run, n) for n in (backend, "torch")}
    plain = PlainDeMo(parameters, RATE, k)
    plain.delta.clear()
    calls["plain"] = run_plain  # the reference looks ahead nowhere
    size = data.dtype.itemsize
    per_element = 8 + 4 + size if look_ahead else 2 * size
    least = data.elements * per_element
    least += sum(entry_bytes(p, peers * p.k, signs) + 16 * p.chunks for p in plans)
    return Work(calls, check, least)


def subtract(data: Data, backend: str, *, k: int = 8) -> Work:
    """`delta -= decode(own result)`."""
    plans = data.layout(k).plans
    deltas = data.state(torch.float32)
    own = [data.entries(plan, 1, signs=False) for plan in plans]

    def run(name: str) -> None:
        for plan, state, entries in zip(plans, deltas, own, strict=True):
            application.subtract(plan, state, entries, backend=name)

    def check(name: str) -> dict[str, Any]:
        data.renew(deltas)
        exact = [
            of_state(plan, state) - decoded(plan, *of_entries(plan, entries))
            for plan, state, entries in zip(plans, deltas, own, strict=True)
        ]
        run(name)
        after = [of_state(plan, state) for plan, state in zip(plans, deltas, strict=True)]
        errors = [distance(a, e) for a, e in zip(after, exact, strict=True)]
        return verdict(name, {"state": max(errors)})

    least = 8 * data.elements + sum(entry_bytes(p, p.k, False) for p in plans)
    return Work({n: partial(run, n) for n in (backend, "torch")}, check, least)


def lookahead(data: Data, backend: str) -> Work:
    """`ahead = parameter - lr * sign(delta)`, parameters in float32."""
    plans = data.layout(1).plans
    parameters = data.tensors("master", torch.float32, 0.01)
    targets = data.tensors("ahead", data.dtype, 0.01)
    deltas = data.state(torch.float32)

    def run(name: str) -> None:
        for plan, state in zip(plans, deltas, strict=True):
            application.lookahead(
                plan,
                members(plan, parameters),
                state,
                [RATE] * len(plan.members),
                members(plan, targets),
                backend=name,
            )

    def check(name: str) -> dict[str, Any]:
        data.renew(parameters)
        exact = [
            of_parameters(plan, members(plan, parameters)) - RATE * of_state(plan, state).sign()
            for plan, state in zip(plans, deltas, strict=True)
        ]
        run(name)
        after = [of_parameters(plan, members(plan, targets)) for plan in plans]
        shares = [flipped(a, e) for a, e in zip(after, exact, strict=True)]
        return verdict(name, {"flips": max(shares)})

    least = (8 + data.dtype.itemsize) * data.elements + 16 * sum(p.chunks for p in plans)
    return Work({n: partial(run, n) for n in (backend, "torch")}, check, least)


def accumulate(data: Data, backend: str, *, which: str) -> Work:
    """fp32 sums of bf16 gradients: the "first" micro-batch, a "middle" one, the "last", squared."""
    gradients = data.tensors("gradient", torch.bfloat16, 1.0)
    sums = data.tensors("sum", torch.float32, 1.0)
    numels = tuple(g.numel() for g in gradients)
    plan = accumulation.plan_accumulation(numels, (0,) * len(numels), data.device)
    fresh = [which == "first"] * len(sums)

    def run(name: str) -> Tensor | None:
        return accumulation.accumulate(
            plan, sums, gradients, fresh, squares=which == "last", backend=name
        )

    def run_plain() -> Tensor | None:
        for total, gradient in zip(sums, gradients, strict=True):
            total.copy_(gradient) if which == "first" else total.add_(gradient)
        return torch.nn.utils.get_total_norm(sums).square() if which == "last" else None

    def check(name: str) -> dict[str, Any]:
        for total in sums:
            data.fill(total, 1.0)
        at = range(0, len(sums), max(1, len(sums) // 16))
        before = [sums[i].double() * (which != "first") for i in at]
        squares = calls[name]()
        error = 0.0
        for i, was in zip(at, before, strict=True):
            error = max(error, distance(sums[i].double(), was + gradients[i].double()))
        if squares is not None:
            # float64 from each sum alone, not all sums at once.
            exact = sum(float(s.double().square().sum()) for s in sums)
            error = max(error, abs(float(squares) - exact) / exact)
        return {"ok": error < 1e-5, "against": "float64, up to 17 tensors", "state": error}

    calls: dict[str, Callable[[], Any]] = {n: partial(run, n) for n in (backend, "torch")}
    calls["plain"] = run_plain
    return Work(calls, check, data.elements * (6 if which == "first" else 10))


def codec(data: Data, backend: str, *, direction: str, signs: bool, k: int = 8) -> Work:
    """The wire: "pack" of the own result, "unpack" of 16 peers' results."""
    plans = data.layout(k).plans
    values: wire.Values = "sign" if signs else data.dtype
    own = [data.entries(plan, 1, signs=signs) for plan in plans]
    packed = [wire.pack(plan, e, values) for plan, e in zip(plans, own, strict=True)]
    received = [p.expand(PEERS, -1).contiguous() for p in packed]
    outs = [torch.empty_like(p) for p in packed]

    def pack(name: str) -> None:
        for plan, entries, out in zip(plans, own, outs, strict=True):
            wire.pack(plan, entries, values, out=out, backend=name)

    def unpack(name: str) -> list[Entries]:
        return [
            wire.unpack(plan, data, values, backend=name)
            for plan, data in zip(plans, received, strict=True)
        ]

    def check(name: str) -> dict[str, Any]:
        for out in outs:
            out.fill_(0xA5)
        pack(name)
        good = all(torch.equal(a, b) for a, b in zip(outs, packed, strict=True))
        for got, sent, plan in zip(unpack(name), own, plans, strict=True):
            for part in ("indices", "values"):
                wide = getattr(got, part).view(plan.chunks, PEERS, -1)
                same = wide.to(torch.float32) == getattr(sent, part).to(torch.float32)[:, None]
                good &= bool(same.all())
        return {"ok": good, "against": "the twin's bytes, and what was packed"}

    entries_bytes = sum(entry_bytes(p, p.k, signs) for p in plans)
    bytes_packed = sum(p.numel() for p in packed)
    call = pack if direction == "pack" else unpack
    times = 1 if direction == "pack" else PEERS
    calls: dict[str, Callable[[], Any]] = {n: partial(call, n) for n in (backend, "torch")}
    return Work(calls, check, times * (entries_bytes + bytes_packed))


def cross_entropy(data: Data, backend: str) -> Work:
    """Sum of losses of a chunk of rows, and the gradient by their logits."""
    vocabulary = data.shapes[0][0]
    rows = max(8, min(2048, data.elements // vocabulary))
    logits = data.fill(torch.empty(rows, vocabulary, dtype=data.dtype, device=data.device), 1.0)
    targets = torch.arange(rows, device=data.device) % vocabulary

    def plain() -> tuple[Tensor, Tensor]:
        given = logits.detach().requires_grad_()
        loss = F.cross_entropy(given.float(), targets, reduction="sum")
        return loss.detach(), torch.autograd.grad(loss, given)[0]

    def run(name: str) -> tuple[Tensor, Tensor | None]:
        return plain() if name == "plain" else loss_and_gradient(logits, targets, backend=name)

    def check(name: str) -> dict[str, Any]:
        data.fill(logits, 1.0)
        given = logits.double().requires_grad_()
        wanted = F.cross_entropy(given, targets, reduction="sum")
        (slope,) = torch.autograd.grad(wanted, given)
        loss, gradient = run(name)
        assert gradient is not None
        error = distance(gradient.double(), slope)
        off = abs(float(loss) / float(wanted.detach()) - 1)
        good = off < 1e-5 and error < 2 * torch.finfo(data.dtype).eps
        return {"ok": good, "against": "float64", "gradient": error, "loss": off}

    names = (backend, "torch", "plain")
    least = 2 * logits.numel() * data.dtype.itemsize
    return Work({n: partial(run, n) for n in names}, check, least, logits.numel())
