"""Autograd hears of what the kernels write, on which its check of saved tensors rests."""

from __future__ import annotations

import pytest
import torch

from psyche_fast.kernels import accumulate as accumulation
from psyche_fast.kernels.apply import apply, lookahead, subtract
from psyche_fast.kernels.encode import encode
from psyche_fast.kernels.plan import Entries
from tests.kernels.support import one_class

pytest.importorskip("triton")

BACKENDS = ["torch", "triton" if torch.cuda.is_available() else "interpret"]
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def tensors(*shapes):
    torch.manual_seed(0)
    return [torch.randn(shape, device=DEVICE) for shape in shapes]


def versions(*given):
    return [t._version for t in given]


def changed(before, *given):
    return [now > then for now, then in zip(versions(*given), before, strict=True)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(16, 16), (32,)], ids=["tiles", "rows"])
def test_what_an_operation_writes_has_a_new_version(backend, shape):
    plan = one_class([shape], k=2, device=DEVICE, chunk=16)
    gradient, parameter, ahead, copy = tensors(shape, shape, shape, shape)
    delta = torch.randn(plan.chunks, plan.h, plan.w, device=DEVICE)
    everything = (delta, gradient, parameter, ahead, copy)

    before = versions(*everything)
    own = encode(plan, delta, [gradient], [0.1], decay=0.9, backend=backend)
    assert changed(before, *everything) == [True, False, False, False, False]

    before = versions(*everything)
    encode(plan, delta, [gradient], [0.1], decay=0.9, previous=own, backend=backend)
    assert changed(before, *everything) == [True, False, False, False, False]

    before = versions(*everything)
    subtract(plan, delta, own, backend=backend)
    assert changed(before, *everything) == [True, False, False, False, False]

    before = versions(*everything)
    apply(plan, [parameter], own, [0.1], backend=backend)
    assert changed(before, *everything) == [False, False, True, False, False]

    before = versions(*everything)
    apply(plan, [parameter], own, [0.1], ahead=[ahead], delta=delta, backend=backend)
    assert changed(before, *everything) == [False, False, True, True, False]

    before = versions(*everything)
    lookahead(plan, [parameter], delta, [0.1], [copy], backend=backend)
    assert changed(before, *everything) == [False, False, False, False, True]


@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_of_gradients_have_a_new_version(backend):
    one, two, gradient = tensors((5,), (7,), (5,))
    plan = accumulation.plan_accumulation((5, 7), (0, 0), DEVICE)
    before = versions(one, two, gradient)
    accumulation.accumulate(
        plan, [one, two], [gradient, None], [True, False], squares=True, backend=backend
    )
    assert changed(before, one, two, gradient) == [True, False, False]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backward_through_a_parameter_that_was_stepped_is_an_error(backend):
    plan = one_class([(16, 16)], k=2, device=DEVICE, chunk=16)
    parameter = torch.ones(16, 16, device=DEVICE, requires_grad=True)
    entries = Entries(
        torch.zeros(plan.chunks, 2, dtype=plan.index_dtype, device=DEVICE),
        torch.ones(plan.chunks, 2, device=DEVICE),
    )
    loss = parameter.square().sum()
    apply(plan, [parameter.detach()], entries, [0.1], backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
