"""What the kernels of methods beside DisTrO are measured on, without transform, all in float32."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from psyche_fast.bench.kernel_checks import (
    RATE,
    distance,
    members,
    of_parameters,
    of_state,
    verdict,
)
from psyche_fast.bench.kernel_data import Data, Work, entry_bytes
from psyche_fast.distro.chunks import Layout, ParameterLayout
from psyche_fast.kernels import encode as encoding
from psyche_fast.kernels.outer import Local, outer
from psyche_fast.kernels.plan import ChunkPlan
from psyche_fast.kernels.quantise import Bits, Codes, dequantise, encode_all

DECAY, MOMENTUM, SIDE = 0.95, 0.9, 64


def _plans(data: Data, k: int) -> tuple[ChunkPlan, ...]:
    layouts = [
        ParameterLayout.of(
            str(i), shape, torch.float32, data.device, compression_chunk=SIDE, compression_topk=k
        )
        for i, shape in enumerate(data.shapes)
    ]
    return Layout(layouts, transform=False).plans


def _exact(plan: ChunkPlan, anchors: list[Tensor], own: list[Tensor], state: Tensor) -> Tensor:
    """What is taken up, of the compared chunks in float64."""
    difference = of_parameters(plan, anchors) - of_parameters(plan, own)
    return DECAY * of_state(plan, state) + difference


def take_up(data: Data, backend: str, *, k: int = 0, bits: Bits | None = None) -> Work:
    """Feedback and anchor minus parameter: the k largest of chunks, or all as codes."""
    plans = _plans(data, k or SIDE**2)
    anchors, own = (data.tensors(what, torch.float32, 0.01) for what in ("master", "own"))
    states = data.state(torch.float32)

    def run(name: str) -> list[Any]:
        results: list[Any] = []
        for plan, state in zip(plans, states, strict=True):
            given: dict[str, Any] = {
                "gradients": members(plan, own), "learning_rates": [1.0] * len(plan.members),
                "decay": DECAY, "anchors": members(plan, anchors), "backend": name,
            }  # fmt: skip
            if bits is None:
                results.append(encoding.encode(plan, state, **given))
            else:
                results.append(encode_all(plan, state, bits=bits, share=1.0, **given))
        return results

    def check(name: str) -> dict[str, Any]:
        data.renew(states)
        pairs = list(zip(plans, states, strict=True))
        exact = [_exact(p, members(p, anchors), members(p, own), state) for p, state in pairs]
        error = 0.0
        for (plan, state), wanted, result in zip(pairs, exact, run(name), strict=True):
            after = of_state(plan, state)
            if isinstance(result, Codes):
                both = Codes(result.codes[None], result.scales[None])
                assert bits is not None
                seen = dequantise(plan, both, bits, backend=name)[0]
                after = after + of_state(plan, seen.view(state.shape))
            error = max(error, distance(after, wanted))
        return verdict(name, {"state": error})

    least = 16 * data.elements + (data.elements if bits else 0)
    least += sum((0 if bits else entry_bytes(p, p.k, False)) + 16 * p.chunks for p in plans)
    return Work({n: partial(run, n) for n in (backend, "torch")}, check, least)


def outer_step(data: Data, backend: str, *, replicas: int, k: int = 0) -> Work:
    """Nesterov's step by the mean of the replicas' k entries, or of all values, and a copy."""
    plans = _plans(data, k or SIDE**2)
    shared, momenta, own = (
        data.tensors(what, torch.float32, 0.01) for what in ("master", "momentum", "own")
    )
    received = [
        data.entries(plan, replicas, signs=False)
        if k
        else data.fill(torch.empty(replicas, p_n, plan.totalk, device=data.device), RATE)
        for plan in plans
        for p_n in (plan.chunks,)
    ]

    def run(name: str) -> None:
        for plan, results in zip(plans, received, strict=True):
            outer(
                plan, members(plan, shared), results, RATE, momenta=members(plan, momenta),
                momentum=MOMENTUM, local=Local(members(plan, own)), backend=name,
            )  # fmt: skip

    def check(name: str) -> dict[str, Any]:
        before = [t.clone() for t in (*shared, *momenta)]
        run("torch")
        wanted = [t.clone() for t in (*shared, *momenta, *own)]  # float64 would not fit
        torch._foreach_copy_([*shared, *momenta], before)
        run(name)
        results = zip((*shared, *momenta, *own), wanted, strict=True)
        error = max(distance(a.double(), b.double()) for a, b in results if a.numel())
        return {"ok": error < 1e-5, "against": "the twin", "state": error}

    least = 20 * data.elements + 16 * sum(p.chunks for p in plans)
    least += sum(entry_bytes(p, replicas * p.k, False) for p in plans) if k else 0
    least += 0 if k else 4 * replicas * data.elements
    return Work({n: partial(run, n) for n in (backend, "torch")}, check, least)
