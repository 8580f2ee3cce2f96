"""What `tools.kernel_guard.on_cuda_tensors` refuses and lets pass; to be run with that plug-in."""

from __future__ import annotations

import pytest
import torch

from psyche_fast.distro import DeMo, DisTrO, DistroStep
from psyche_fast.distro.message import MessageFormat
from tools.kernel_guard.cuda_tensors import DEVICE, CudaTensor, WaitError, no_waiting
from tools.kernel_guard.tests.small_kernels import add

CPU = torch.device("cpu")
SHAPES = {"matrix": (128, 192), "head": (67, 128), "norm": (192,), "scalar": ()}


def ours(values=(1.0, 2.0, 3.0), device="cuda"):
    return torch.tensor(values, device=device)


def test_the_device_has_an_index():
    x = ours()
    assert (x.device, x.is_cuda) == (torch.device("cuda:0"), True)
    assert x.device != torch.device("cuda")
    for other in (x + 1, x[1:], x.view(torch.int32), x.clone(), x.new_zeros(2), x.to("cuda")):
        assert other.device == DEVICE
    assert torch.empty(0, device="cuda").device == torch.zeros_like(x).device == DEVICE
    for other in (x.cpu(), x.to("cpu"), torch.zeros_like(x, device="cpu"), torch.zeros(1)):
        assert other.device == CPU


def test_values_are_a_cpu_s():
    x = ours()
    view = x[1:]
    view += 10
    x[0] = 7
    torch.add(x, 1, out=x)
    torch._foreach_add_([x], 1)
    assert x.tolist() == [9, 14, 15]
    assert x.cpu().data_ptr() != x.data_ptr() == x.detach().data_ptr()
    target = torch.zeros(3)
    target.copy_(x)
    assert target.tolist() == x.cpu().numpy().tolist() == [9, 14, 15]
    parameter = torch.nn.Parameter(x)
    (parameter * 2).sum().backward()
    assert parameter.grad.tolist() == [2, 2, 2]
    assert parameter.grad.device == DEVICE


@pytest.mark.parametrize(
    "mixed",
    [
        lambda cuda, cpu: cuda + cpu,
        lambda cuda, cpu: cpu.add_(cuda),
        lambda cuda, cpu: torch.cat([cpu, cuda]),
        lambda cuda, cpu: torch._foreach_mul_([cuda, cuda], [cpu, cpu]),
        lambda cuda, cpu: cpu[cuda.long() - 1],
        lambda cuda, cpu: cuda.index_add_(0, cpu.long() - 1, cuda),
        lambda cuda, cpu: torch.where(cuda > 1, cpu, cuda),
    ],
)
def test_tensors_of_both_devices_are_refused(mixed):
    with pytest.raises(RuntimeError, match="at least two devices"):
        mixed(ours(), ours(device="cpu"))
    assert (ours() * torch.tensor(2.0)).tolist() == [2, 4, 6]  # a number of the host's


WAITING = {
    "item": lambda x: x[0].item(),
    "tolist": lambda x: x.tolist(),
    "bool": lambda x: bool((x > 0).all()),
    "int": lambda x: int(x[0]),
    "float": lambda x: float(x[0]),
    "if": lambda x: 1 if x[0] else 2,
    "range": lambda x: list(range(x.long()[0])),
    "cpu": lambda x: x.cpu(),
    "to the host": lambda x: x.to("cpu"),
    "to the device": lambda x: torch.zeros(3).to(x.device),
    "from pages": lambda x: torch.zeros(3).to(x.device, non_blocking=True),
    "of the other's kind": lambda x: torch.zeros(3).to(x),
    "tensor": lambda x: torch.tensor([1.0], device=x.device),
    "copy_": lambda x: x.copy_(torch.zeros(3)),
    "copy_ to the host": lambda x: torch.zeros(3).copy_(x),
    "nonzero": lambda x: x.nonzero(),
    "equal": lambda x: torch.equal(x, x),
    "unique": lambda x: x.unique(),
    "mask": lambda x: x[x > 1],
    "mask that is written to": lambda x: x.__setitem__(x > 1, torch.zeros_like(x[:2])),
    "index of the host's": lambda x: x[torch.tensor([0, 1])],
    "synchronize": lambda x: torch.cuda.synchronize(),
}


@pytest.mark.parametrize("name", WAITING)
def test_what_waits_is_refused_where_it_must_not(name):
    x = ours()
    WAITING[name](x.clone())
    with no_waiting("the test"), pytest.raises(WaitError, match="the test waits for the device"):
        WAITING[name](x)
    WAITING[name](x)


def test_what_does_not_wait_is_not_refused():
    x, host = ours(), torch.tensor([1.0, 2.0, 4.0])
    with no_waiting("the test"):
        y = host.pin_memory().to(x.device, non_blocking=True)
        host.copy_(x, non_blocking=True)
        y[y > 2] = 0
        y[torch.arange(2, device=x.device)] += torch.full((2,), 1.0, device=x.device)
        y = torch.where(x > 1, y, x) + 1
        y *= torch.tensor(2.0)
        assert y.shape == (3,)
    assert y.tolist() == [4, 8, 2]
    assert host.tolist() == [1, 2, 3]


def test_a_kernel_takes_no_tensor_of_the_host():
    x, out = torch.ones(64, device="cuda"), torch.zeros(64, device="cuda")
    launch = add[(1,)]
    launch(x, x, out, 64, BLOCK=64)
    assert (out == 2).all()
    for arguments in ((x.cpu(), x, out), (x, x, out.cpu())):
        with pytest.raises(ValueError, match="cannot be accessed from Triton"):
            launch(*arguments, 64, BLOCK=64)


def parameters(device):
    generator = torch.Generator().manual_seed(0)
    made = {}
    for name, shape in SHAPES.items():
        made[name] = torch.randn(shape, generator=generator).to(device, torch.bfloat16)
        made[name].requires_grad_().grad = torch.zeros_like(made[name])
    return made


def steps(device, make, *, signs=False):
    """Parameters and state after two steps."""
    weights = parameters(device)
    generator = torch.Generator().manual_seed(1)
    step, state = make(weights, torch.tensor(0.01).to(device), signs)
    for _ in range(2):
        for p in weights.values():
            p.grad.copy_(torch.randn(p.shape, generator=generator))
        step()
    return [t.detach().cpu() for t in [*weights.values(), *state()]]


def distro_of(weights, lr, signs):
    backend = "triton" if lr.device.type == "cuda" else "interpret"
    options = {"compression_decay": 0.9, "compression_chunk": 64, "compression_topk": 4}
    distro = DistroStep(weights, **options, backend=backend)
    form = MessageFormat(distro.layout, distro.backends, signs=signs)
    own = None

    def step():
        nonlocal own
        distro.look_ahead(lr)
        own = distro.compress(own, lr, grad_scale=lr)
        entries, faults = form.unpack(torch.stack([form.pack(own)] * 2))
        assert faults == {}
        distro.update(entries, lr)

    return step, lambda: distro.momentum().values()


def demo_of(weights, lr, signs):
    backend = "triton" if lr.device.type == "cuda" else "interpret"
    demo = DeMo(weights.values(), lr, 0.9, 4, weight_decay=0.1, backend=backend)
    return (lambda: demo.step(grad_scale=lr)), lambda: [demo.state[p]["delta"] for p in demo.state]


def delayed_of(weights, lr, signs):
    backend = "triton" if lr.device.type == "cuda" else "interpret"
    options = {"weight_decay": 0.1, "quantize": signs, "backend": backend}
    run = DisTrO(weights.values(), lr, 0.9, 4, **options)
    return (lambda: run.step(grad_scale=lr)), lambda: [run.state[p]["delta"] for p in run.state]


@pytest.mark.parametrize(
    ("make", "signs"),
    [(distro_of, False), (distro_of, True), (demo_of, False), (delayed_of, True)],
)
def test_a_step_does_not_wait_and_comes_to_the_same_bits(make, signs):
    """Whole optimisers, whose operations the plug-in forbids to wait.

    But for `DisTrO.step`, which waits until the last step's results are known to be right.
    """
    here, there = steps(CPU, make, signs=signs), steps(DEVICE, make, signs=signs)
    for a, b in zip(here, there, strict=True):
        assert not isinstance(b, CudaTensor)
        assert torch.equal(a, b)
