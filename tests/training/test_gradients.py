from __future__ import annotations

import math

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from psyche_fast.training.gradients import (
    Fp32Accumulator,
    clip_factor,
    global_norm,
    gradients,
    scale_,
)
from tests.groups import run_ranks


def test_fp32_accumulation_keeps_what_bf16_loses() -> None:
    parts = [torch.full((3, 5), v).bfloat16() for v in (1.0, *[2.0**-9] * 64)]
    parameters = {"a": torch.nn.Parameter(torch.zeros(3, 5, dtype=torch.bfloat16))}
    unused = torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    accumulator = Fp32Accumulator({**parameters, "unused": unused})
    for part in parts:
        (parameters["a"] * part).sum().backward()
        accumulator.add()
        assert parameters["a"].grad is None
    accumulator.finish()
    grad = parameters["a"].grad
    assert grad is not None
    assert grad.dtype == torch.float32
    assert torch.equal(grad, torch.full((3, 5), 1.125)), "bf16 would have stayed at 1"
    assert unused.grad is None
    # the next step starts from nothing
    parameters["a"].grad = None
    parameters["a"].sum().backward()
    accumulator.add()
    accumulator.finish()
    assert parameters["a"].grad is not None
    assert parameters["a"].grad.unique().tolist() == [1.0]


def _norms(rank: int) -> tuple[float, list[torch.Tensor]]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shard", "tensor"))
    generator = torch.Generator().manual_seed(0)
    full = [torch.randn(shape, generator=generator) for shape in ((8, 6), (3, 4), (5,), (2,))]
    placed = [
        distribute_tensor(full[0], mesh, [Shard(0), Shard(1)]),
        distribute_tensor(full[1], mesh["shard"], [Shard(0)]),  # uneven: 2 rows and 1
        distribute_tensor(full[2], mesh["tensor"], [Replicate()]),
        full[3],
    ]
    norm = global_norm(placed, torch.device("cpu"))
    scale_(placed, clip_factor(norm, 1.0))
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in placed]
    return norm.item(), whole


def test_norm_and_clipping_over_a_mixture_of_meshes() -> None:
    generator = torch.Generator().manual_seed(0)
    full = [torch.randn(shape, generator=generator) for shape in ((8, 6), (3, 4), (5,), (2,))]
    expected = math.sqrt(sum(float(t.double().square().sum()) for t in full))
    results = run_ranks(_norms, 4)
    for norm, clipped in results:
        assert norm == results[0][0], "the same bits on every rank"
        assert norm == pytest.approx(expected, rel=1e-6)
        for a, b in zip(clipped, full, strict=True):
            torch.testing.assert_close(a, b / (norm + 1e-6))


def test_clip_factor() -> None:
    assert clip_factor(torch.tensor(0.5), 1.0) == 1.0
    assert float(clip_factor(torch.tensor(4.0), 1.0)) == pytest.approx(0.25, rel=1e-5)
    assert clip_factor(torch.tensor(4.0), None) == 1.0


def test_norm_of_bf16_gradients_is_fp32() -> None:
    parameter = torch.nn.Parameter(torch.zeros(70_000, dtype=torch.bfloat16))
    parameter.grad = torch.ones_like(parameter)
    assert float(global_norm(gradients([parameter]), torch.device("cpu"))) == pytest.approx(
        math.sqrt(70_000), rel=1e-6
    )
    assert float(global_norm([], torch.device("cpu"))) == 0.0
