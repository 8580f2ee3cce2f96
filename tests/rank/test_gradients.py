from __future__ import annotations

import math

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from psyche_fast.rank.gradients import (
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
    for number, part in enumerate(parts, start=1):
        (parameters["a"] * part).sum().backward()
        accumulator.add(last=number == len(parts))
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
    accumulator.add(last=True)
    accumulator.finish()
    assert parameters["a"].grad is not None
    assert parameters["a"].grad.unique().tolist() == [1.0]


def bf16(size: int) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.zeros(size, dtype=torch.bfloat16))


def test_the_norm_of_the_sums_is_taken_in_the_last_pass() -> None:
    generator = torch.Generator().manual_seed(0)
    parameters = {"a": bf16(5000), "late": bf16(7), "early": bf16(70), "unused": bf16(3)}
    accumulator = Fp32Accumulator(parameters)
    sums = {name: torch.zeros(p.numel(), dtype=torch.float64) for name, p in parameters.items()}
    for names in (("a", "early"), ("a",), ("a", "late")):
        for name in names:
            parameter = parameters[name]
            parameter.grad = torch.randn(parameter.numel(), generator=generator).bfloat16()
            sums[name] += parameter.grad
        accumulator.add(last="late" in names)
    norm = accumulator.finish()
    for name, parameter in parameters.items():
        if name == "unused":
            assert parameter.grad is None
        else:
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad.double(), sums[name], rtol=1e-6, atol=1e-6)
    exact = math.sqrt(sum(float(total.square().sum()) for total in sums.values()))
    assert float(norm) == pytest.approx(exact, rel=1e-6)


def test_a_step_without_any_gradient_has_norm_zero() -> None:
    parameter = bf16(5)
    accumulator = Fp32Accumulator({"a": parameter})
    accumulator.add(last=True)
    assert float(accumulator.finish()) == 0.0
    assert parameter.grad is None


def test_the_sums_stay_where_they_are() -> None:
    """Addresses recur, so that tables of them are made once."""
    parameter = bf16(5)
    accumulator = Fp32Accumulator({"a": parameter})
    addresses = set()
    for value in (1.0, 2.0):
        parameter.grad = torch.full((5,), value, dtype=torch.bfloat16)
        accumulator.add(last=True)
        norm = accumulator.finish()
        assert float(norm) == pytest.approx(value * math.sqrt(5))
        assert parameter.grad is not None
        assert parameter.grad.tolist() == [value] * 5
        addresses.add(parameter.grad.data_ptr())
        parameter.grad = None
    assert len(addresses) == 1


def _accumulated(rank: int) -> tuple[float, float, list[torch.Tensor]]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shard", "tensor"))
    generator = torch.Generator().manual_seed(0)

    def draw(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    shapes = ((8, 6), (3, 4), (1, 5), (5,), (2,))
    places = (
        (mesh, [Shard(0), Shard(1)]),
        (mesh["shard"], [Shard(0)]),  # uneven: 2 rows and 1
        (mesh["shard"], [Shard(0)]),  # empty on one rank
        (mesh["tensor"], [Replicate()]),
        None,
    )

    def placed(full: torch.Tensor, place: tuple | None) -> torch.Tensor:
        return full if place is None else distribute_tensor(full, *place)

    parameters = {
        str(at): torch.nn.Parameter(placed(draw(shape), place))
        for at, (shape, place) in enumerate(zip(shapes, places, strict=True))
    }
    accumulator = Fp32Accumulator(parameters)
    for micro in range(3):
        for parameter, shape, place in zip(parameters.values(), shapes, places, strict=True):
            parameter.grad = placed(draw(shape), place)
        accumulator.add(last=micro == 2)
    norm = accumulator.finish()
    grads = gradients(parameters.values())
    for grad, parameter in zip(grads, parameters.values(), strict=True):
        assert grad.dtype == torch.float32
        assert getattr(grad, "placements", None) == getattr(parameter, "placements", None)
    whole = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in grads]
    return norm.item(), global_norm(grads, torch.device("cpu")).item(), whole


@pytest.mark.processes
def test_accumulation_and_its_norm_over_a_mixture_of_meshes() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((8, 6), (3, 4), (1, 5), (5,), (2,))
    drawn = [
        [torch.randn(shape, generator=generator).bfloat16().double() for shape in shapes]
        for _ in range(4)  # the parameters, and three micro-batches
    ]
    expected = [sum(parts[1:], parts[0] * 0) for parts in zip(*drawn, strict=True)]
    exact = math.sqrt(sum(float(t.square().sum()) for t in expected))
    results = run_ranks(_accumulated, 4)
    for norm, again, whole in results:
        assert norm == results[0][0], "the same bits on every rank"
        assert norm == again
        assert norm == pytest.approx(exact, rel=1e-6)
        for got, wanted in zip(whole, expected, strict=True):
            torch.testing.assert_close(got.double(), wanted, rtol=1e-6, atol=1e-6)


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


@pytest.mark.processes
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


@pytest.mark.parametrize("norm", [math.inf, math.nan])
@pytest.mark.parametrize("max_norm", [1.0, None])
def test_a_norm_that_is_not_finite_refuses_the_gradient(norm: float, max_norm: float) -> None:
    assert clip_factor(torch.tensor(norm), max_norm).isnan()


def test_norm_of_bf16_gradients_is_fp32() -> None:
    parameter = torch.nn.Parameter(torch.zeros(70_000, dtype=torch.bfloat16))
    parameter.grad = torch.ones_like(parameter)
    assert float(global_norm(gradients([parameter]), torch.device("cpu"))) == pytest.approx(
        math.sqrt(70_000), rel=1e-6
    )
    assert float(global_norm([], torch.device("cpu"))) == 0.0
