"""What only a GPU shows: graphs, waiting, races, memory beyond 32 bits. Skipped without one.

Results against float64 are the other tests' matter, which run on a GPU by themselves.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from psyche_fast import kernels
from psyche_fast.distro import DeMo, DistroStep
from psyche_fast.distro.message import MessageFormat
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


def captured(step):
    """A CUDA graph of a step, ready to replay; the step has run before."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


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


def check_replays(make, device):
    """Two twins, five steps each; the last three of one are replays of a graph.

    `make(parameters)` returns the step and a function that shows its state.
    """
    outcomes = []
    for capture in (False, True):
        parameters = parameters_with_gradients(device)
        step, state = make(parameters)
        run = step
        for number in range(5):
            fill_gradients(parameters, number)
            if capture and number == 2:
                run = captured(step)  # records the step without doing it
            run()
        torch.cuda.synchronize()
        outcomes.append([*(p.detach().clone() for p in parameters.values()), *state()])
    for eager, replayed in zip(*outcomes, strict=True):
        assert torch.equal(eager, replayed)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_graph_of_distro_equals_eager_steps(weight_decay, device, backend):
    """Entries are handed from step to step in memory that stays where it is."""

    def make(parameters):
        lr = torch.tensor(0.01, device=device)
        distro = DistroStep(
            parameters,
            compression_decay=0.9,
            compression_chunk=64,
            compression_topk=4,
            weight_decay=weight_decay,
            backend=backend,
        )
        own = distro.compress(None, lr)
        peers = [
            Entries(torch.cat([e.indices] * 2, dim=1), torch.cat([e.values] * 2, dim=1))
            for e in own
        ]

        def step():
            distro.look_ahead(lr)
            new = distro.compress(own, lr, grad_scale=lr)
            distro.update(peers, lr)
            for kept, entries in zip(own, new, strict=True):
                kept.indices.copy_(entries.indices)
                kept.values.copy_(entries.values)

        return step, lambda: [*distro.momentum().values(), *(e.values for e in own)]

    check_replays(make, device)


@pytest.mark.parametrize("ahead", ["copy", "in place"])
def test_a_graph_of_the_operations_equals_eager_steps(ahead, device, backend):
    plans = [one_class([s], k=4, device=device, dtype=torch.bfloat16) for s in SHAPES.values()]

    def make(parameters):
        rates, scale = torch.tensor([0.01], device=device), torch.tensor(0.5, device=device)
        classes = []
        for plan, p in zip(plans, parameters.values(), strict=True):
            delta = torch.zeros(plan.chunks, plan.h, plan.w, device=device)
            sizes = plan.chunks, plan.k
            kept = Entries(
                torch.zeros(sizes, device=device).to(plan.index_dtype),
                torch.zeros(sizes, dtype=plan.dtype, device=device),
                unique=True,
            )
            copied = p.detach() if ahead == "in place" else p.detach().clone()
            classes.append((plan, p, delta, kept, copied))

        def step():
            for plan, p, delta, kept, copied in classes:
                options = {"decay": 0.9, "gradient_scale": scale, "previous": kept}
                own = kernels.encode(plan, delta, [p.grad], rates, backend=backend, **options)
                options = {"shrinks": rates, "ahead": [copied], "delta": delta}
                kernels.apply(plan, [p.detach()], own, rates, backend=backend, **options)
                kept.indices.copy_(own.indices)
                kept.values.copy_(own.values)

        return step, lambda: [t for c in classes for t in (c[2], c[3].values, c[4])]

    check_replays(make, device)


def test_a_graph_refuses_what_is_not_ready(device, backend):
    """A learning rate that is not on the device yet would live in the graph's own memory."""
    plan = one_class([(64, 64)], k=4, device=device)
    delta, parameter = torch.zeros(1, 64, 64, device=device), torch.zeros(64, 64, device=device)
    kernels.lookahead(plan, [parameter], delta, [0.1], backend=backend)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="learning rates"), torch.cuda.graph(graph):
        kernels.lookahead(plan, [parameter], delta, [0.123456], backend=backend)


def test_two_streams_at_once_are_refused(device, backend):
    parameters = parameters_with_gradients(device)
    demo = DeMo(parameters.values(), 0.01, compression_topk=4, backend=backend)
    demo.step()
    torch.cuda.synchronize()
    first, second = torch.cuda.Stream(device), torch.cuda.Stream(device)
    with torch.cuda.stream(first):
        torch.cuda._sleep(1 << 30)  # cycles: half a second
        demo.step()
    with torch.cuda.stream(second):
        with pytest.raises(RuntimeError, match="two CUDA streams at once"):
            demo.step()
        torch.cuda.synchronize()
        demo.step()


@pytest.mark.parametrize("optimizer", ["demo", "distro"])
def test_optimizers_do_not_wait_for_the_device(optimizer, device, backend):
    parameters = parameters_with_gradients(device)
    fill_gradients(parameters, 0)
    lr = torch.tensor(0.01, device=device)
    if optimizer == "demo":
        demo = DeMo(parameters.values(), lr, compression_topk=4, backend=backend)
        step = partial(demo.step, grad_scale=lr)
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
        own = kernels.encode(plan, delta, gradients, rates, decay=0.9, backend=backend)
        kernels.apply(plan, parameters, own, rates, backend=backend)
        kernels.subtract(plan, delta, own, backend=backend)
        kernels.lookahead(plan, parameters, delta, rates, backend=backend)

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
            own = kernels.encode(plan, delta, [gradient], [0.1], decay=0.9, backend=backend)
            kernels.subtract(plan, delta, own, backend=backend)
            kernels.apply(plan, [parameter], entries, [0.1], backend=backend)
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
    entries = kernels.encode(plan, delta, [gradient], [1.0], decay=0.9, backend=backend)
    kernels.apply(plan, [parameter], entries, [0.5], backend=backend)
    last = slice(plan.chunks - 8, plan.chunks)
    assert torch.equal(delta[last].view(-1, 64), gradient[-512:].float())
    alone = one_class([(512, 64)], k=8, device=device, dtype=torch.bfloat16)
    ends = Entries(entries.indices[last], entries.values[last], unique=True)
    support.check_selection(alone, ends, delta[last])
    (direction,), (doubt,) = support.directions_of(alone, ends, [(512, 64)])
    after = f64(parameter[-512:])
    assert (np.abs(after) == 0.5).mean() > 0.99
    assert ((after == -0.5 * direction) | doubt).all()
