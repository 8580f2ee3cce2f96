"""Every hot path on every device of this machine, against the same in float64 as plain as it goes.

Small shapes, among them some that no block of a kernel divides. What is compared with shares
nothing with the package: numbers are right by what operations promise, not by what another backend
gives.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from psyche_fast.distro.chunks import Layout, ParameterLayout
from psyche_fast.doctor.finding import REPORT, Finding, described, ok, problem
from psyche_fast.kernels import accumulate as sums
from psyche_fast.kernels import pack as wire
from psyche_fast.kernels.apply import apply
from psyche_fast.kernels.backends import backend_of, checked_backend, explain
from psyche_fast.kernels.encode import encode
from psyche_fast.kernels.plan import ChunkPlan, Entries, chunk_view
from psyche_fast.models.attention import choose_attention
from psyche_fast.models.document_attention import Documents, attend
from psyche_fast.models.head_loss import chunked_cross_entropy

_SHAPES = ((128, 192), (67, 71), (3, 40, 52), (131,), (64,))
_RATE, _DECAY, _PEERS = 0.5, 0.9, 3
_LOSE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""How far off results may be, relative to the largest of what they are compared with."""

DTYPES = tuple(_LOSE)


def compare(tell: Callable[[str], None] = lambda what: None) -> Iterator[Finding]:
    """Runs each path on each device.

    Args:
        tell: is told what is tried next.
    """
    count = torch.cuda.device_count()
    devices = [torch.device("cpu"), *(torch.device("cuda", index) for index in range(count))]
    for device in devices:
        try:
            backend, reason = explain(device)
        except ValueError as error:  # what PSYCHE_FAST_KERNELS asks for cannot run here
            yield problem(f"kernels on {device}", str(error), "unset PSYCHE_FAST_KERNELS")
            continue
        for name, path in _PATHS.items():
            what = f"{name} on {device}"
            tell(what)
            began = time.perf_counter()
            try:
                for dtype in DTYPES:
                    path(device, dtype)
            except Exception as error:  # the next path may be sound
                yield problem(what, described(error), _remedy(error))
                continue
            seconds = time.perf_counter() - began
            how = f"{backend}: {reason}" if path in _KERNELS else "PyTorch"
            yield ok(what, f"agrees with float64, {seconds:.2f} s ({how})")


def _remedy(error: Exception) -> str:
    if isinstance(error, _Wrong):
        return "do not train on this device: look at its memory and driver, and report it"
    if isinstance(error, torch.OutOfMemoryError):
        return "other processes hold the GPU's memory: end them"
    if "no kernel image" in str(error):
        return "this torch is not built for this GPU: install another build"
    if "triton" in described(error).lower() or "compil" in str(error).lower():
        return "Triton cannot compile here: see compiler and kernels' cache above"
    return REPORT


class _Wrong(RuntimeError):
    """A path gives other numbers than it should."""


def _close(what: str, got: Tensor, exact: Tensor, most: float) -> None:
    got, exact = got.detach().double().cpu(), exact.detach().double().cpu()
    scale = float(exact.abs().max()) or 1.0
    off = float((got - exact).abs().max()) / scale
    if not off <= most:  # nor where it is NaN
        raise _Wrong(f"{what} is {off:.2g} off, relative to the largest; {most:.2g} is allowed")


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _plans(device: torch.device, dtype: torch.dtype) -> tuple[tuple[ChunkPlan, str], ...]:
    layouts = [
        ParameterLayout.of(str(n), shape, dtype, device, compression_chunk=64, compression_topk=8)
        for n, shape in enumerate(_SHAPES)
    ]
    return tuple((plan, backend_of(plan, "auto")[0]) for plan in Layout(layouts).plans)


def _tensors(plan: ChunkPlan, seed: int) -> list[Tensor]:
    """Of the shapes of a class's parameters, in its type."""
    shapes = [_SHAPES[member.position] for member in plan.members]
    return [_random(*s, seed=seed + n).to(plan.device, plan.dtype) for n, s in enumerate(shapes)]


def _chunks(plan: ChunkPlan, tensors: list[Tensor]) -> Tensor:
    """float64 `[chunks, h, w]` on the CPU."""
    parts = [
        chunk_view(t.double().cpu(), plan.h, plan.w).reshape(-1, plan.h, plan.w) for t in tensors
    ]
    return torch.cat(parts)


def _basis(n: int) -> Tensor:
    """The orthonormal DCT-II, float64 `[place, frequency]`."""
    place, frequency = torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")
    basis = torch.cos(math.pi * (2 * place + 1).double() * frequency / (2 * n)) * math.sqrt(2 / n)
    basis[:, 0] /= math.sqrt(2)
    return basis


def _dense(plan: ChunkPlan, entries: Entries) -> Tensor:
    """What entries stand for: `[chunks, h * w]`, each the mean of those that name it."""
    index, values = entries.indices.cpu().to(torch.int64), entries.values.cpu()
    values = (1.0 - 2.0 * values.double()) if values.dtype == torch.bool else values.double()
    total = torch.zeros(plan.chunks, plan.totalk, dtype=torch.float64)
    counts = total.clone().scatter_add_(1, index, torch.ones_like(values))
    return total.scatter_add_(1, index, values) / counts.clamp(min=1)


def _received(plan: ChunkPlan, *, signs: bool) -> Entries:
    """Distinct ascending indices of each of several peers, side by side."""
    generator = torch.Generator().manual_seed(3)
    picks = torch.rand(plan.chunks, _PEERS, plan.totalk, generator=generator).argsort(2)
    index = picks[..., : plan.k].sort(2)[0].reshape(plan.chunks, -1)
    values = _random(plan.chunks, _PEERS * plan.k, seed=4).to(plan.dtype)
    return Entries(
        index.to(plan.index_dtype).to(plan.device),
        (values < 0 if signs else values).to(plan.device),
    )


def _encode(device: torch.device, dtype: torch.dtype) -> None:
    """Momentum, DCT and top-k."""
    for plan, backend in _plans(device, dtype):
        gradients, start = _tensors(plan, 10), _random(plan.chunks, plan.h, plan.w, seed=2)
        delta = start.float().to(device)
        found = encode(
            plan, delta, gradients, [_RATE] * len(gradients), decay=_DECAY, backend=backend
        )
        exact = _DECAY * start + _RATE * _chunks(plan, gradients)
        _close("the momentum", delta, exact, 1e-4)
        exact = _basis(plan.h).t() @ exact @ _basis(plan.w)
        exact = exact.reshape(plan.chunks, -1)
        index = found.indices.cpu().to(torch.int64)
        if int((index[:, 1:] <= index[:, :-1]).sum()):
            raise _Wrong("indices do not ascend")
        chosen = exact.gather(1, index)
        _close("a coefficient", found.values, chosen, _LOSE[dtype])
        least = exact.abs().topk(plan.k, 1)[0][:, -1:]
        if bool((chosen.abs() < least - 1e-3 * exact.abs().max()).any()):
            raise _Wrong("a larger coefficient was left out")


def _apply(device: torch.device, dtype: torch.dtype) -> None:
    """Peers' results into the parameters."""
    for plan, _ in _plans(device, dtype):
        backend = checked_backend(plan, "auto")
        entries = _received(plan, signs=False)
        before = _tensors(plan, 20)
        after = [t.clone() for t in before]
        apply(plan, after, entries, [_RATE] * len(after), backend=backend)
        dense = _dense(plan, entries).view(plan.chunks, plan.h, plan.w)
        update = _basis(plan.h) @ dense @ _basis(plan.w).t()
        sure = update.abs() > 1e-4 * update.abs().max()  # elsewhere rounding decides the sign
        exact = _chunks(plan, before) - _RATE * update.sign()
        got = _chunks(plan, after)
        _close("a parameter", got[sure], exact[sure], torch.finfo(dtype).eps)


def _pack(device: torch.device, dtype: torch.dtype) -> None:
    """Results to bytes and back; the bytes are those of the reference, which peers may use."""
    for plan, backend in _plans(device, dtype):
        on_cpu = _plans(torch.device("cpu"), dtype)
        (other,) = [p for p, _ in on_cpu if (p.h, p.w, p.k) == (plan.h, plan.w, plan.k)]
        for values in ("sign", dtype):
            both = _received(plan, signs=values == "sign")
            sent = Entries(
                both.indices[:, : plan.k].contiguous(), both.values[:, : plan.k].contiguous(), True
            )
            data = wire.pack(plan, sent, values, backend=backend)
            here = Entries(sent.indices.cpu(), sent.values.cpu(), True)
            if not torch.equal(data.cpu(), wire.pack(other, here, values, backend="torch")):
                raise _Wrong("its bytes are not the reference's")
            back = wire.unpack(plan, data.view(1, -1), values, backend=backend)
            if not (
                torch.equal(back.indices.cpu().to(torch.int64), here.indices.to(torch.int64))
                and torch.equal(back.values.cpu(), here.values)
            ):
                raise _Wrong("what is read is not what was written")


def _accumulate(device: torch.device, dtype: torch.dtype) -> None:
    """Micro-batches' gradients into fp32 sums, and their norm."""
    sizes = (5, 1023, 4096, 70_001)
    backend, _ = explain(device)
    plan = sums.plan_accumulation(sizes, (0, 1, 1, 0), device)
    before = [_random(size, seed=size).float().to(device) for size in sizes]
    gradients = [_random(size, seed=size + 1).to(device, dtype) for size in sizes]
    totals = [t.clone() for t in before]
    squares = sums.accumulate(plan, totals, gradients, [False] * 4, squares=True, backend=backend)
    assert squares is not None
    exact = [b.double() + g.double() for b, g in zip(before, gradients, strict=True)]
    for total, wanted in zip(totals, exact, strict=True):
        _close("a sum", total, wanted, 1e-6)
    norms = [float(t.square().sum()) for t in exact]
    _close("the norm", squares, torch.tensor([norms[0] + norms[3], norms[1] + norms[2]]), 1e-5)


def _loss(device: torch.device, dtype: torch.dtype) -> None:
    """The loss without logits, and its gradients."""
    rows, size, vocabulary = 131, 48, 1031
    weights = [_random(rows, size), _random(vocabulary, size, seed=1) / size**0.5]
    ours = [t.to(device, dtype).requires_grad_() for t in weights]
    exact = [t.detach().double().cpu().requires_grad_() for t in ours]
    targets = torch.arange(rows) * 7 % vocabulary
    targets[::5] = -100
    loss = chunked_cross_entropy(ours[0], ours[1], None, targets.to(device))
    wanted = F.cross_entropy(exact[0] @ exact[1].t(), targets, reduction="sum", ignore_index=-100)
    loss.backward()  # type: ignore[no-untyped-call]
    wanted.backward()  # type: ignore[no-untyped-call]
    _close("the loss", loss, wanted, _LOSE[dtype])
    for name, one, other in zip(("hidden states", "head"), ours, exact, strict=True):
        assert one.grad is not None and other.grad is not None
        _close(f"the gradient of the {name}", one.grad, other.grad, 2 * _LOSE[dtype])


class _Layer(nn.Module):
    """What Transformers' attention functions look at of a layer."""

    is_causal = True
    num_key_value_groups = 2


def _attention(device: torch.device, dtype: torch.dtype) -> None:
    """Attention as layers call it, documents apart; and flash attention's where it runs."""
    lengths, size = [17, 64, 48], 32
    length = sum(lengths)
    query = _random(1, 4, length, size).to(device, dtype)
    key, value = (_random(1, 2, length, size, seed=s).to(device, dtype) for s in (1, 2))
    apart, _ = attend(_Layer().eval(), query, key, value, None, documents=Documents(lengths, set()))
    found = {"attention": (apart, lengths)}
    if choose_attention("auto", device.type) == "flash_attention_2" and dtype != torch.float32:
        from flash_attn import flash_attn_func

        alone = flash_attn_func(*(t.transpose(1, 2) for t in (query, key, value)), causal=True)
        found["flash attention"] = (alone, [length])
    for name, (got, parts) in found.items():
        exact = []
        split = zip(*(t.double().cpu().split(parts, 2) for t in (query, key, value)), strict=True)
        for q, k, v in split:
            k, v = (t.repeat_interleave(2, 1) for t in (k, v))
            scores = q @ k.transpose(2, 3) / size**0.5
            later = torch.ones(scores.shape[2:]).triu(1).bool()
            exact.append(scores.masked_fill(later, -math.inf).softmax(3) @ v)
        _close(name, got, torch.cat(exact, 2).transpose(1, 2), _LOSE[dtype])


_KERNELS = (_encode, _apply, _pack, _accumulate)
_PATHS: dict[str, Callable[[torch.device, torch.dtype], None]] = {
    "encode and top-k": _encode,
    "apply": _apply,
    "pack": _pack,
    "accumulate": _accumulate,
    "loss": _loss,
    "attention": _attention,
}
