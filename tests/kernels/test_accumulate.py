"""Sums of gradients and squared norms: the kernel against its twin and against float64."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from psyche_fast.kernels.accumulate import accumulate, plan_accumulation, squared_norms

pytest.importorskip("triton")

# The package has the function by this name.
kernel = importlib.import_module("psyche_fast.kernels.triton.accumulate")


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NORM_ERROR = (1e-6, 2e-6)  # of the kernel, and of the twin
SETTINGS = settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def place(values, dtype, offset, device):
    """A copy of `values`, `offset` elements behind an aligned address."""
    memory = torch.empty(offset + values.numel(), dtype=dtype, device=device)
    memory[offset:] = values.to(device)
    return memory[offset:]


def draw(numel, dtype, generator):
    return torch.randn(numel, generator=generator).to(dtype)


def squares64(tensors, groups, count):
    result = [0.0] * count
    for tensor, group in zip(tensors, groups, strict=True):
        if tensor is not None:
            result[group] += float(tensor.double().square().sum())
    return result


@SETTINGS
@given(data=st.data())
def test_micro_batches_of_all_kinds(data, device, backend):
    """Any sizes, dtypes, alignments and missing gradients; the last with the norm."""
    sizes = data.draw(st.lists(st.sampled_from([0, 1, 7, 1023, 4096, 4100, 9001]), max_size=4))
    count = len(sizes)
    kinds = data.draw(st.sampled_from([[BF16], [FP32], [FP16], [BF16, FP32], [BF16, FP16, FP32]]))
    dtypes = [data.draw(st.sampled_from(kinds)) for _ in sizes]
    offsets = [data.draw(st.integers(0, 3)) for _ in sizes]
    split = data.draw(st.integers(0, count))
    groups = [int(at >= split and split > 0) for at in range(count)]
    micros = data.draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    plan = plan_accumulation(tuple(sizes), tuple(groups), device)
    sums = {
        name: [place(torch.full((n,), torch.nan), FP32, o % 2, device) for n, o in
               zip(sizes, offsets, strict=True)]
        for name in ("torch", backend)
    }  # fmt: skip
    fresh = [True] * count
    exact = [torch.zeros(n, dtype=torch.float64) for n in sizes]
    for micro in range(micros):
        gradients = [
            place(draw(n, d, generator), d, o, device)
            if data.draw(st.booleans() if micro else st.just(True) | st.booleans())
            else None
            for n, d, o in zip(sizes, dtypes, offsets, strict=True)
        ]
        last = micro == micros - 1
        squares = {
            name: accumulate(plan, sums[name], gradients, fresh, squares=last, backend=name)
            for name in sums
        }
        fresh = [f and g is None for f, g in zip(fresh, gradients, strict=True)]
        for total, gradient in zip(exact, gradients, strict=True):
            if gradient is not None:
                total += gradient.cpu()
        if not last:
            assert squares == {"torch": None, backend: None}
    for at, total in enumerate(exact):
        one, other = sums["torch"][at], sums[backend][at]
        if fresh[at]:
            assert one.isnan().all()
            assert other.isnan().all()
        else:
            assert torch.equal(one, other), "the same additions in the same order"
            torch.testing.assert_close(other.cpu().double(), total, rtol=1e-6, atol=1e-6)
    held = [None if f else s for f, s in zip(fresh, sums[backend], strict=True)]
    expected = torch.tensor(squares64(held, groups, plan.group_count), dtype=torch.float64)
    for name in sums:
        assert squares[name].dtype == FP32
        torch.testing.assert_close(
            squares[name].cpu().double(), expected, rtol=NORM_ERROR[name == "torch"], atol=0
        )


@SETTINGS
@given(
    sizes=st.lists(st.integers(0, 6000), max_size=5),
    dtype=st.sampled_from([BF16, FP16, FP32]),
    offset=st.integers(0, 2),
)
def test_squared_norms(sizes, dtype, offset, device, backend):
    generator = torch.Generator().manual_seed(len(sizes))
    tensors = [place(draw(n, dtype, generator), dtype, offset, device) for n in sizes]
    if len(sizes) > 3:
        tensors[1] = None
    groups = [at % min(2, len(sizes)) for at in range(len(sizes))]
    plan = plan_accumulation(tuple(sizes), tuple(groups), device)
    expected = torch.tensor(squares64(tensors, groups, plan.group_count), dtype=torch.float64)
    for name in ("torch", backend):
        got = squared_norms(plan, tensors, backend=name)
        torch.testing.assert_close(
            got.cpu().double(), expected, rtol=NORM_ERROR[name == "torch"], atol=0
        )


def test_norms_of_large_tensors_lose_nothing(device):
    """torch's norm adds one square after the other on a CPU: here it is off by a thousandth."""
    size = (1 << 24) + 5
    values = torch.rand(size, generator=torch.Generator().manual_seed(0)).to(device)
    plan = plan_accumulation((size,), (0,), device)
    wanted = values.double().square().sum()
    got = squared_norms(plan, [values], backend="torch")[0]
    assert abs(float(got / wanted) - 1) < NORM_ERROR[1]


def test_the_norm_is_no_worse_than_torch(device, backend):
    values = torch.rand(300_000, generator=torch.Generator().manual_seed(0)).to(device)
    plan = plan_accumulation((300_000,), (0,), device)
    exact = float(values.double().square().sum())
    error = abs(float(squared_norms(plan, [values], backend=backend)) - exact)
    plain = abs(float(values.norm().square()) - exact)
    assert error <= max(plain, exact * 2**-23)


def test_bits_do_not_depend_on_the_number_of_programs(device, backend, monkeypatch):
    generator = torch.Generator().manual_seed(1)
    sizes = (9001, 50_000, 4096)
    gradients = [place(draw(n, BF16, generator), BF16, 0, device) for n in sizes]
    plan = plan_accumulation(sizes, (0, 1, 0), device)
    results = []
    for programs in (1, 2, 5):
        monkeypatch.setattr(kernel, "programs", lambda device, per_sm, work, n=programs: n)
        sums = [torch.empty(n, device=device) for n in sizes]
        squares = accumulate(plan, sums, gradients, [True] * 3, squares=True, backend=backend)
        results.append([squares, *sums])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_shows_in_its_group_alone(bad, device, backend):
    plan = plan_accumulation((5000, 10), (0, 1), device)
    gradients = [torch.ones(5000, device=device), torch.ones(10, device=device)]
    gradients[0][4999] = bad
    for name in ("torch", backend):
        squares = squared_norms(plan, gradients, backend=name)
        assert not squares[0].isfinite()
        assert squares[1] == 10


def test_offsets_beyond_32_bits(device, backend):
    """A block 2^32 elements into its tensor; the table alone says so, the memory is small."""
    block, far = kernel.BLOCK, 1 << 20
    gradient = torch.randn(block, device=device).bfloat16()
    total = torch.zeros(block, device=device)
    start = far * block
    assert start == 1 << 32
    row = [gradient.data_ptr() - 2 * start, total.data_ptr() - 4 * start, start + block, -far, 7]
    kernel.accumulate_blocks[(1,)](
        torch.tensor([row], device=device),
        torch.zeros(1, dtype=torch.int32, device=device),
        torch.empty(1, device=device),
        1,
        DTYPES=1,
        SUMS=True,
        NORM=False,
        BLOCK=block,
        PART=kernel.PART,
    )
    assert torch.equal(total, gradient.float())


def test_tables_of_a_large_model():
    numels = (3 << 31, 5, 1 << 32)
    tables = kernel._Tables(plan_accumulation(numels, (1, 0, 1), torch.device("cpu")))
    blocks = [-(-numel // 4096) for numel in numels]
    assert tables.blocks == sum(blocks)
    assert tables.first == [1, 0, 1 + blocks[0]], "blocks of one group lie side by side"
    assert tables.segments == [(0, 1), (1, sum(blocks))]
    assert tables.block_tensor[[0, 1, blocks[0], blocks[0] + 1, -1]].tolist() == [1, 0, 0, 2, 2]


def test_tables_of_pointers_are_kept_and_bounded(device, backend):
    plan = plan_accumulation((11, 13), (0, 0), device)
    sums = [torch.empty(n, device=device) for n in plan.numels]
    gradients = [torch.ones(n, device=device) for n in plan.numels]
    for _ in range(3):
        accumulate(plan, sums, gradients, [True, True], backend=backend)
    (tables,) = kernel._tables[plan].values()
    kept = tables._kept
    assert len(kept) == 1
    accumulate(plan, sums, gradients, [False, True], backend=backend)
    assert len(kept) == 2
    for _ in range(kernel._TABLES_KEPT + 5):
        gradients.append(torch.ones(11, device=device))  # alive, so at an address of its own
        squared_norms(plan, [gradients[-1], None], backend=backend)
    assert len(kept) == kernel._TABLES_KEPT


def test_a_device_has_one_plan_whatever_it_is_called(device, backend):
    named = [torch.device(name) for name in (device.type, f"{device.type}:0")]
    plan, other = (plan_accumulation((12,), (0,), one) for one in named)
    assert plan is other
    squares = squared_norms(plan, [torch.ones(12, device=named[1])], backend=backend)
    assert squares.tolist() == [12]


def test_a_gradient_with_gaps(device, backend):
    plan = plan_accumulation((12,), (0,), device)
    sums = {name: [torch.zeros(3, 4, device=device)] for name in ("torch", backend)}
    transposed = torch.arange(12.0, device=device).view(4, 3).t()
    for name, own in sums.items():
        accumulate(plan, own, [transposed], [False], backend=name)
        assert torch.equal(own[0], transposed)


def test_mistakes_are_named(device, backend):
    plan = plan_accumulation((4, 4), (0, 0), device)
    fine = [torch.zeros(4, device=device) for _ in range(2)]
    with pytest.raises(ValueError, match="gradient 1: wanted 4 elements, got 5"):
        squared_norms(plan, [fine[0], torch.zeros(5, device=device)], backend=backend)
    with pytest.raises(TypeError, match=r"gradient 0: wanted one of .*, got torch.float64"):
        squared_norms(plan, [fine[0].double(), None], backend=backend)
    with pytest.raises(TypeError, match=r"sum 1: wanted torch.float32, got torch.bfloat16"):
        accumulate(plan, [fine[0], fine[1].bfloat16()], [None, None], [True, True])
    with pytest.raises(ValueError, match="sum 0: wanted a contiguous tensor"):
        accumulate(plan, [torch.zeros(8, device=device)[::2], fine[1]], [None, None], [True, True])
    with pytest.raises(ValueError, match=r"sum 0: wanted its gradient's shape \[2, 2\], got \[4\]"):
        accumulate(plan, fine, [torch.zeros(2, 2, device=device), None], [True, True])
    with pytest.raises(ValueError, match="wanted a tensor on"):
        squared_norms(plan, [torch.zeros(4, device="meta"), None], backend=backend)


@pytest.mark.gpu
def test_nothing_waits_for_the_device(device, backend):
    plan = plan_accumulation((70_000, 10), (0, 1), device)
    sums = [torch.empty(n, device=device) for n in plan.numels]
    gradients = [torch.ones(n, device=device, dtype=BF16) for n in plan.numels]

    def step():
        accumulate(plan, sums, gradients, [True, True], backend=backend)
        return accumulate(plan, sums, gradients, [False, False], squares=True, backend=backend)

    step()  # compiles, and uploads its tables
    torch.cuda.set_sync_debug_mode("error")
    try:
        squares = step()
        fresh = [g.clone() for g in gradients]  # pointers not seen yet
        accumulate(plan, sums, fresh, [False, False], backend=backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert squares.tolist() == [4 * 70_000, 40]
    assert torch.equal(sums[1], torch.full((10,), 3.0, device=device))
