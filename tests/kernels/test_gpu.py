"""What only a GPU shows: waiting, streams, races, memory beyond 32 bits. Skipped without one.

Results against float64 are the other tests' matter, which run on a GPU by themselves.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from psyche_fast.distro import DeMo, DistroStep
from psyche_fast.distro.message import MessageFormat
from psyche_fast.kernels.apply import apply, lookahead, subtract
from psyche_fast.kernels.encode import encode
from psyche_fast.kernels.plan import Entries
from tests.kernels import support
from tests.kernels.support import CLASSES, f64, one_class

pytestmark = pytest.mark.gpu
HUGE = 1 << 31
"""More elements than a 32-bit offset reaches."""
SHAPES = {"matrix": (128, 192), "head": (67, 128), "norm": (192,), "scalar": ()}


def random(shapes, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(device) for shape in shapes]


def parameters_with_gradients(device, dtype=torch.bfloat16):
    parameters = {}
    for name, weight in zip(SHAPES, random(SHAPES.values(), device), strict=True):
        parameters[name] = weight.to(dtype).requires_grad_()
        parameters[name].grad = torch.zeros_like(parameters[name])
    return parameters


def fill_gradients(parameters, seed):
    device = next(iter(parameters.values())).device
    for p, g in zip(parameters.values(), random(SHAPES.values(), device, seed), strict=True):
        p.grad.copy_(g)


def test_a_step_cannot_be_captured(device, backend):
    parameters = parameters_with_gradients(device)
    demo = DeMo(parameters.values(), 0.01, compression_topk=4, backend=backend)
    demo.step()
    torch.cuda.synchronize()
    with (
        pytest.raises(RuntimeError, match=r"step cannot be captured in a CUDA graph"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        demo.step()


def test_two_streams_at_once_are_refused(device, backend):
    parameters = parameters_with_gradients(device)
    demo = DeMo(parameters.values(), 0.01, compression_topk=4, backend=backend)
    demo.step()
    torch.cuda.synchronize()
    first, second = torch.cuda.Stream(device), torch.cuda.Stream(device)
    for stream in (first, second):  # memory of a new one's own, which may be waited for
        with torch.cuda.stream(stream):
            demo.step()
        torch.cuda.synchronize()
    with torch.cuda.stream(first):
        torch.cuda._sleep(1 << 30)  # cycles: half a second
        demo.step()
    with torch.cuda.stream(second):
        with pytest.raises(RuntimeError, match="two CUDA streams at once"):
            demo.step()
        torch.cuda.synchronize()
        demo.step()


@pytest.mark.parametrize("optimizer", ["demo", "demo by numbers", "distro"])
def test_optimizers_do_not_wait_for_the_device(optimizer, device, backend):
    parameters = parameters_with_gradients(device)
    fill_gradients(parameters, 0)
    lr = torch.tensor(0.01, device=device)
    if optimizer == "demo":
        demo = DeMo(parameters.values(), lr, compression_topk=4, backend=backend)
        step = partial(demo.step, grad_scale=lr)
    elif optimizer == "demo by numbers":
        step = DeMo(parameters.values(), 0.01, compression_topk=4, backend=backend).step
    else:
        options = {"compression_decay": 0.9, "compression_chunk": 64, "compression_topk": 4}
        distro = DistroStep(parameters, **options, backend=backend)
        form = MessageFormat(distro.layout, distro.backends, signs=True)
        own = distro.compress(None, lr)
        peers, faults = form.unpack(form.pack(own)[None])  # the one thing that waits
        assert faults == {}

        def step():
            distro.look_ahead(lr)
            form.pack(distro.compress(own, lr, grad_scale=lr))
            distro.update(peers, lr)

    step()  # compiles, which may wait
    before = [p.detach().clone() for p in parameters.values()]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(not torch.equal(p, b) for p, b in zip(parameters.values(), before, strict=True))


def test_operations_do_not_wait_for_the_device(device, backend):
    shapes = CLASSES["64x64"]
    plan = one_class(shapes, k=4, device=device)
    delta = torch.zeros(plan.chunks, plan.h, plan.w, device=device)
    gradients, parameters = random(shapes, device), random(shapes, device, 1)

    def step(rates):
        own = encode(plan, delta, gradients, rates, decay=0.9, backend=backend)
        apply(plan, parameters, own, rates, backend=backend)
        subtract(plan, delta, own, backend=backend)
        lookahead(plan, parameters, delta, rates, gradients, backend=backend)

    step([0.1, 0.2])  # compiles, which may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in range(3):  # learning rates of a schedule, uploaded every step
            step([0.1 + number, 0.2 + number])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert delta.isfinite().all()


def test_the_same_bits_every_time(device, backend):
    """64 peers' entries of few coefficients meet in the same places; 20 runs, one outcome."""
    shapes = [(1024, 1024), (4096,), (67, 640)]
    for shape in shapes:
        plan = one_class([shape], k=8, device=device, dtype=torch.bfloat16)
        generator = torch.Generator().manual_seed(0)
        size = (plan.chunks, 64 * 8)
        entries = Entries(
            torch.randint(0, plan.totalk, size, generator=generator).to(device, plan.index_dtype),
            torch.randn(size, generator=generator).to(device, torch.bfloat16),
        )
        gradient, weight = random([shape] * 2, device)
        outcomes = []
        for _ in range(20):
            delta = torch.zeros(plan.chunks, plan.h, plan.w, device=device)
            parameter = weight.to(torch.bfloat16)
            own = encode(plan, delta, [gradient], [0.1], decay=0.9, backend=backend)
            subtract(plan, delta, own, backend=backend)
            apply(plan, [parameter], entries, [0.1], backend=backend)
            outcomes.append([own.indices.int(), own.values, delta, parameter])
        for outcome in outcomes[1:]:
            assert all(torch.equal(a, b) for a, b in zip(outcomes[0], outcome, strict=True))


def test_more_elements_than_32_bits_count(device, backend):
    """A parameter of 2^31 + 2^20 elements: its last chunks against float64, and nothing beyond."""
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GiB of GPU memory")
    shape = ((HUGE + (1 << 20)) // 64, 64)
    plan = one_class([shape], k=8, device=device, dtype=torch.bfloat16)
    torch.manual_seed(0)
    gradient = torch.randn(shape, device=device, dtype=torch.bfloat16)
    parameter = torch.zeros(shape, device=device, dtype=torch.bfloat16)
    delta = torch.zeros(plan.chunks, 64, 64, device=device)
    entries = encode(plan, delta, [gradient], [1.0], decay=0.9, backend=backend)
    apply(plan, [parameter], entries, [0.5], backend=backend)
    last = slice(plan.chunks - 8, plan.chunks)
    assert torch.equal(delta[last].view(-1, 64), gradient[-512:].float())
    alone = one_class([(512, 64)], k=8, device=device, dtype=torch.bfloat16)
    ends = Entries(entries.indices[last], entries.values[last], unique=True)
    support.check_selection(alone, ends, delta[last])
    (direction,), (doubt,) = support.directions_of(alone, ends, [(512, 64)])
    after = f64(parameter[-512:])
    assert (np.abs(after) == 0.5).mean() > 0.99
    assert ((after == -0.5 * direction) | doubt).all()
