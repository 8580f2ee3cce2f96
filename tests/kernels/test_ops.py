"""The custom operators: the same results when `torch.compile` traces the caller."""

from __future__ import annotations

import gc

import pytest
import torch

from psyche_fast import kernels
from psyche_fast.distro import Distro
from psyche_fast.distro.chunks import Layout, ParameterLayout
from psyche_fast.kernels import ops
from psyche_fast.kernels.plan import Entries

CPU = torch.device("cpu")
SHAPES = [(16, 24), (8, 8)]


def make_plan():
    layouts = [
        ParameterLayout.of(
            str(i), shape, torch.float32, CPU, compression_chunk=8, compression_topk=3
        )
        for i, shape in enumerate(SHAPES)
    ]
    return Layout(layouts).plans[0]


def tensors():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


@pytest.mark.parametrize("rates", [[0.1, 0.2], torch.tensor([0.1, 0.2])], ids=["floats", "tensor"])
def test_a_traced_step_equals_an_eager_one(rates):
    plan = make_plan()
    factor = torch.tensor(0.5)

    def step(delta, parameters, ahead, gradients, indices, values):
        own = kernels.encode(
            plan,
            delta,
            gradients,
            rates,
            decay=0.9,
            gradient_scale=factor,
            previous=Entries(indices, values, unique=True),
        )
        kernels.apply(plan, parameters, own, rates, shrinks=[0.9, 0.9], ahead=ahead, delta=delta)
        kernels.subtract(plan, delta, own)
        kernels.lookahead(plan, parameters, delta, rates)
        return own.indices, own.values

    outcomes = []
    first = kernels.encode(plan, torch.randn(plan.chunks, 8, 8), tensors(), rates, decay=0.9)
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        delta = torch.ones(plan.chunks, 8, 8)
        parameters, ahead = tensors(), tensors()
        out = function(
            delta, parameters, ahead, [*tensors()[:1], None], first.indices, first.values
        )
        outcomes.append([*out, delta, *parameters, *ahead])
    for eager, traced in zip(*outcomes, strict=True):
        assert torch.equal(eager, traced)
    assert not torch.equal(outcomes[0][2], torch.ones(plan.chunks, 8, 8))


def test_operators_are_sound():
    plan = make_plan()
    delta = torch.randn(plan.chunks, 8, 8)
    indices, values = ops.encode(
        plan.handle, delta, tensors(), [0.1, 0.1], None, 0.9, 1.0, None, None, None, False, [], [],
        None, [], None, "torch",
    )  # fmt: skip
    assert indices.dtype == plan.index_dtype
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        ops.encode,
        (plan.handle, delta, tensors(), [0.1, 0.1], None, 0.9, 1.0, None, indices, values, True, [],
         [], None, [], None, "torch"),
        test_utils=tests,
    )  # fmt: skip
    torch.library.opcheck(
        ops.apply,
        (plan.handle, tensors(), indices, values, True, [], torch.tensor(0.1), [], None, tensors(),
         False, delta, "torch"),
        test_utils=tests,
    )  # fmt: skip
    torch.library.opcheck(
        ops.subtract, (plan.handle, delta, indices, values, True, "torch"), test_utils=tests
    )


def test_a_plan_that_is_gone_is_refused():
    plan = make_plan()
    handle = plan.handle
    del plan
    gc.collect()
    with pytest.raises(ValueError, match=f"no chunk plan with handle '{handle}'"):
        ops.subtract(
            handle, torch.zeros(1, 8, 8), torch.zeros(1, 1), torch.zeros(1, 1), True, "torch"
        )


def test_a_compiled_caller_of_the_optimizer_does_not_break():
    runs = []
    for compiled in (False, True):
        parameters = {str(i): t.requires_grad_() for i, t in enumerate(tensors())}
        distro = Distro(parameters, compression_decay=0.9, compression_topk=3, compression_chunk=8)

        def step(previous, distro=distro, parameters=parameters):
            distro.error_correction(0.1)
            loss = sum((p * p).sum() for p in parameters.values())
            loss.backward()
            own = distro.generate(previous, 0.1, 0.1)
            if previous:
                distro.apply([previous], 0.1)
            for p in parameters.values():
                p.grad = None
            return own

        function = torch.compile(step, backend="eager") if compiled else step
        previous = None
        for _ in range(3):
            previous = function(previous)
        runs.append([p.detach() for p in parameters.values()])
    for eager, traced in zip(*runs, strict=True):
        assert torch.equal(eager, traced)
