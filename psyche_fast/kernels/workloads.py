"""What `autotune` runs: every kernel on synthetic state, with results that can be compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from psyche_fast.devices import indexed
from psyche_fast.kernels import accumulate as accumulation
from psyche_fast.kernels import pack as wire
from psyche_fast.kernels.apply import apply, lookahead
from psyche_fast.kernels.cross_entropy import cross_entropy
from psyche_fast.kernels.encode import encode
from psyche_fast.kernels.outer import Local, outer
from psyche_fast.kernels.plan import ChunkPlan, Entries, Member, cut_slices
from psyche_fast.kernels.quantise import Bits, encode_all

SIDE = 64
_RATE, _DECAY = 1e-3, 0.999


@dataclass
class Workload:
    """What a kernel is timed on.

    Attributes:
        run: calls the kernel; returns its results.
        state: what it changes, or writes to.
    """

    run: Callable[[], Sequence[Tensor]]
    state: list[Tensor]

    def __post_init__(self) -> None:
        self._fresh = [t.clone() for t in self.state]

    def bits(self) -> list[Tensor]:
        """State and results of one run from the state as it was at first."""
        for tensor, fresh in zip(self.state, self._fresh, strict=True):
            tensor.copy_(fresh)
        return [t.clone() for t in (*self.run(), *self.state)]


def workload(kernel: str, device: torch.device, backend: str, chunks: int) -> Workload:
    """The workload of a kernel that `tuning.toml` names.

    Args:
        kernel: its name.
        device: where.
        backend: "triton" or "interpret".
        chunks: chunks of 64 x 64 to work on ("rows": 16 times as many of 1 x 64).
    """
    return _WORKLOADS[kernel](_Random(device), backend, chunks)


class _Random:
    """Synthetic tensors and entries, the same in every run."""

    def __init__(self, device: torch.device) -> None:
        self.device = indexed(device)
        self._generator = torch.Generator(self.device).manual_seed(0)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        tensor = torch.empty(shape, dtype=dtype, device=self.device)
        return tensor.normal_(generator=self._generator)

    def entries(self, plan: ChunkPlan, peers: int, *, signs: bool) -> Entries:
        """`plan.k` distinct, ascending indices of each peer."""
        step = plan.totalk // plan.k
        shape, flat = (plan.chunks, peers, plan.k), (plan.chunks, peers * plan.k)
        index = torch.randint(
            0, step, shape, dtype=torch.int32, device=self.device, generator=self._generator
        )
        index += step * torch.arange(plan.k, dtype=torch.int32, device=self.device)
        values = self.normal(*shape, dtype=plan.dtype)
        index = index.to(plan.index_dtype).view(flat)
        return Entries(index, (values < 0 if signs else values).view(flat), peers == 1)

    def plan(self, chunks: int, h: int, k: int, *, transform: bool = True) -> ChunkPlan:
        """A class of one bfloat16 parameter `[chunks * h, SIDE]`."""
        members = (Member(0, (chunks, 1), 0, chunks),)
        basis_h, basis_w = (self._basis(n if transform else 0) for n in (h, SIDE))
        return ChunkPlan(
            h=h,
            w=SIDE,
            k=k,
            dtype=torch.bfloat16,
            compute_dtype=torch.float32,
            device=self.device,
            basis_h=basis_h,
            basis_w=basis_w,
            rows_h=basis_h.t().contiguous(),
            rows_w=basis_w.t().contiguous(),
            members=members,
            slices=cut_slices(members, h * SIDE, 1 << 25),
        )

    def _basis(self, n: int) -> Tensor:
        """Any orthogonal matrix costs what the DCT's does."""
        noise = torch.randn(n, n, generator=torch.Generator().manual_seed(n))
        return torch.linalg.qr(noise)[0].to(self.device)


def _encode(random: _Random, backend: str, chunks: int) -> Workload:
    plans = [random.plan(chunks, SIDE, k) for k in (8, 32)]
    gradient = random.normal(chunks * SIDE, SIDE, dtype=torch.bfloat16)
    delta = random.normal(chunks, SIDE, SIDE)
    own = [random.entries(plan, 1, signs=False) for plan in plans]

    def run() -> list[Tensor]:
        results: list[Tensor] = []
        for plan, previous in zip(plans, own, strict=True):
            result = encode(
                plan, delta, [gradient], [_RATE], decay=_DECAY, previous=previous, backend=backend
            )
            results += [result.indices, result.values]
        return results

    return Workload(run, [delta])


def _rows(random: _Random, backend: str, chunks: int) -> Workload:
    plan = random.plan(16 * chunks, 1, 8)
    gradient, parameter = (random.normal(plan.chunks, SIDE, dtype=torch.bfloat16) for _ in range(2))
    delta = random.normal(plan.chunks, 1, SIDE)
    own = random.entries(plan, 1, signs=False)
    received = random.entries(plan, 16, signs=True)

    def run() -> list[Tensor]:
        entries = encode(
            plan, delta, [gradient], [_RATE], decay=_DECAY, previous=own, backend=backend
        )
        apply(plan, [parameter], received, [_RATE], backend=backend)
        return [entries.indices, entries.values]

    return Workload(run, [delta, parameter])


def _apply(random: _Random, backend: str, chunks: int) -> Workload:
    plan = random.plan(chunks, SIDE, 8)
    parameter, ahead = (random.normal(chunks * SIDE, SIDE, dtype=torch.bfloat16) for _ in range(2))
    delta = random.normal(chunks, SIDE, SIDE)
    received = [random.entries(plan, peers, signs=True) for peers in (16, 64)]

    def run() -> list[Tensor]:
        for entries in received:
            apply(plan, [parameter], entries, [_RATE], ahead=[ahead], delta=delta, backend=backend)
        return []

    return Workload(run, [parameter, ahead])


def _lookahead(random: _Random, backend: str, chunks: int) -> Workload:
    plan = random.plan(chunks, SIDE, 8)
    parameter, ahead = (random.normal(chunks * SIDE, SIDE, dtype=torch.bfloat16) for _ in range(2))
    delta = random.normal(chunks, SIDE, SIDE)

    def run() -> list[Tensor]:
        lookahead(plan, [parameter], delta, [_RATE], [ahead], backend=backend)
        return []

    return Workload(run, [ahead])


def _accumulate(random: _Random, backend: str, chunks: int) -> Workload:
    size, tensors = chunks * SIDE * SIDE // 4, 4
    gradients = [random.normal(size, dtype=torch.bfloat16) for _ in range(tensors)]
    sums = [random.normal(size) for _ in range(tensors)]
    plan = accumulation.plan_accumulation((size,) * tensors, (0,) * tensors, random.device)

    def run() -> list[Tensor]:
        squares = accumulation.accumulate(
            plan, sums, gradients, [False] * tensors, squares=True, backend=backend
        )
        assert squares is not None
        return [squares]

    return Workload(run, sums)


def _codec(random: _Random, backend: str, chunks: int) -> Workload:
    plan = random.plan(chunks, SIDE, 8)
    sent = random.entries(plan, 1, signs=True)

    def run() -> list[Tensor]:
        packed = wire.pack(plan, sent, "sign", backend=backend)
        received = wire.unpack(plan, packed.expand(8, -1), "sign", backend=backend)
        return [packed, received.indices, received.values]

    return Workload(run, [])


def _plain(random: _Random, backend: str, chunks: int) -> Workload:
    plan = random.plan(chunks, SIDE, SIDE**2, transform=False)
    anchor, parameter = (random.normal(chunks * SIDE, SIDE) for _ in range(2))
    delta = random.normal(chunks, SIDE, SIDE)

    def run() -> list[Tensor]:
        results: list[Tensor] = []
        bits: Bits
        for bits in (2, 4):
            codes = encode_all(
                plan, delta, [parameter], [1.0], bits=bits, decay=_DECAY, anchors=[anchor],
                share=1.0, backend=backend,
            )  # fmt: skip
            assert codes is not None
            results += [codes.codes, codes.scales]
        return results

    return Workload(run, [delta])


def _outer(random: _Random, backend: str, chunks: int) -> Workload:
    plans = [random.plan(chunks, SIDE, 64, transform=is_so) for is_so in (False, True)]
    shared, momentum, own = (random.normal(chunks * SIDE, SIDE) for _ in range(3))
    received = [random.entries(plan, 8, signs=False) for plan in plans]

    def run() -> list[Tensor]:
        for plan, entries in zip(plans, received, strict=True):
            outer(
                plan, [shared], entries, _RATE, momenta=[momentum], momentum=_DECAY,
                local=Local([own], mix=0.5), backend=backend,
            )  # fmt: skip
        return []

    return Workload(run, [shared, momentum, own])


def _cross_entropy(random: _Random, backend: str, chunks: int) -> Workload:
    rows, size = max(1, chunks // 16), 500 * SIDE
    logits = random.normal(rows, size, dtype=torch.bfloat16)
    targets = torch.arange(rows, device=random.device) % size
    return Workload(lambda: [cross_entropy(logits, targets, backend=backend)[0]], [logits])


_WORKLOADS: dict[str, Callable[[_Random, str, int], Workload]] = {
    "accumulate": _accumulate,
    "apply": _apply,
    "codec": _codec,
    "cross_entropy": _cross_entropy,
    "encode": _encode,
    "lookahead": _lookahead,
    "outer": _outer,
    "plain": _plain,
    "rows": _rows,
}
