"""Replicas on a CPU, in Triton's interpreter and on a GPU train together, the same to the bit."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from psyche_fast.distro.exchange import Exchange
from psyche_fast.distro.message import MessageFormat, hash_bits
from psyche_fast.distro.optimizer import DistroStep
from psyche_fast.schedules import Cosine
from tests.groups import run_ranks

SHAPES = {"square": (64, 64), "odd": (33, 7), "vector": (48,)}
STEPS = 3
SCHEDULE = Cosine(
    base_lr=0.01, warmup_init_lr=0.0, warmup_steps=1, final_lr=0.001, total_steps=STEPS
)


def train(rank: int, backends: list[str], dtype: torch.dtype, signs: bool) -> list[list[int]]:
    """Hashes of all parameters, and of what is kept of them in float32, after every step."""
    backend = backends[rank]
    device = torch.device("cuda" if backend == "triton" else "cpu")
    start = torch.Generator().manual_seed(0)
    parameters = {
        name: torch.nn.Parameter(torch.randn(shape, generator=start).to(device, dtype))
        for name, shape in SHAPES.items()
    }
    step = DistroStep(
        parameters,
        compression_decay=0.9,
        compression_chunk=64,
        compression_topk=4,
        weight_decay=0.1,
        backend=backend,
    )
    assert set(step.backends) == {backend}
    peers = dist.group.WORLD
    form = MessageFormat(step.layout, step.backends, signs=signs)
    results = Exchange(form, peers, dist.new_group(backend="gloo"))
    own, previous, hashes = None, 0.0, []
    noise = torch.Generator().manual_seed(1 + rank)
    for number in range(STEPS):
        rate = SCHEDULE.get_lr(number)
        step.look_ahead(previous)
        for p in parameters.values():
            p.grad = torch.randn(p.shape, generator=noise).to(p)
        own = step.compress(own, rate)
        results.send(own)
        if len(results) > 1:
            entries = results.receive()
            assert entries is not None
            step.update(entries, rate)
        previous = rate
        step.plain()
        kept = step.state_dict().get("master", {})
        both = [*parameters.values(), *kept.values()]
        hashes.append([int(hash_bits(t.detach().cpu())) for t in both])
    results.settle()
    return hashes


def check(backends: list[str], dtype: torch.dtype, signs: bool) -> None:
    interpreted = [rank for rank, backend in enumerate(backends) if backend == "interpret"]
    first, *others = run_ranks(
        train, len(backends), backends, dtype, signs, interpreted=interpreted
    )
    assert len({tuple(hashes) for hashes in first}) == STEPS
    assert all(other == first for other in others)


@pytest.mark.processes
@pytest.mark.parametrize(("dtype", "signs"), [(torch.bfloat16, True), (torch.float32, False)])
def test_replicas_stay_the_same(dtype: torch.dtype, signs: bool) -> None:
    check(["torch", "interpret"], dtype, signs)


@pytest.mark.gpu
@pytest.mark.processes
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("dtype", "signs"), [(torch.bfloat16, True), (torch.float32, False)])
def test_with_a_gpu(dtype: torch.dtype, signs: bool) -> None:
    check(["torch", "triton", "interpret"], dtype, signs)
