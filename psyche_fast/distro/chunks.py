"""How parameters are cut into chunks, chunks grouped into classes, and a chunk's DCT basis."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from psyche_fast.devices import indexed
from psyche_fast.integers import cosine
from psyche_fast.kernels.plan import ChunkPlan, Member, cut_slices, index_dtype

logger = logging.getLogger(__name__)

# Elements of a chunk class that are worked on at once: bounds the workspace to a few hundred MB on
# an accelerator, a few tens on a CPU. A step of DeMo on 5 M parameters, k = 8, two threads of a
# Xeon, least of five runs: 2^18 39.6 ms, 2^19 35.5, 2^21 30.9.
MAX_SLICE_ELEMENTS = 1 << 25
MAX_SLICE_ELEMENTS_CPU = 1 << 21
# A chunk this many times smaller than the dimensions would allow is reported: it compresses that
# much less.
_DEGENERATE_FACTOR = 8


def chunk_side(n: int, target: int) -> int:
    """Largest divisor of a dimension's size `n` that is not over `target`; 1 where `n` is 0."""
    if n == 0:
        return 1
    return next(side for side in range(min(n, target), 0, -1) if n % side == 0)


def _encoded(sizes: tuple[int, ...], h: int, w: int) -> tuple[int, ...]:
    if len(sizes) == 1:
        return (sizes[0] // w, w)
    return (*sizes[:-2], sizes[-2] // h, sizes[-1] // w, h, w)


@dataclass(frozen=True, slots=True)
class ParameterLayout:
    """One parameter and its cut: `[N]` to `[N/w, w]`, `[.., R, C]` to `[.., R/h, C/w, h, w]`.

    Attributes:
        name: name for messages and saved state.
        shape: shape of the parameter; a 0-d one is treated as `[1]`.
        dtype: dtype of the parameter and of unquantised values.
        device: device of the parameter, always with its index.
        h: rows of a chunk, 1 for a vector.
        w: columns of a chunk.
        k: coefficients kept of each chunk.
        xshape: the encoded shape.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    h: int
    w: int
    k: int
    xshape: tuple[int, ...]

    @classmethod
    def of(
        cls,
        name: str,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        *,
        compression_chunk: int,
        compression_topk: int,
    ) -> ParameterLayout:
        """Cut a parameter of the given shape.

        Raises:
            ValueError: the dtype is not a floating-point one.
        """
        if not dtype.is_floating_point:
            raise ValueError(f"parameter {name} must be floating point, got {dtype}")
        sizes = tuple(shape) or (1,)
        w = chunk_side(sizes[-1], compression_chunk)
        h = 1 if len(sizes) == 1 else chunk_side(sizes[-2], compression_chunk)
        k = min(compression_topk, h * w)
        xshape = _encoded(sizes, h, w)
        return cls(name, tuple(shape), dtype, indexed(device), h, w, k, xshape)

    def part(self, shape: Sequence[int]) -> ParameterLayout:
        """The same chunks for a part of the parameter that cuts none of them."""
        shape = tuple(shape)
        assert shape[-1] % self.w == 0
        assert len(shape) == 1 or shape[-2] % self.h == 0
        return replace(self, shape=shape, xshape=_encoded(shape, self.h, self.w))

    @property
    def totalk(self) -> int:
        """Coefficients of a chunk."""
        return self.h * self.w

    @property
    def lead(self) -> tuple[int, ...]:
        """Numbers of chunks: the encoded shape without the chunk's own dimensions."""
        return self.xshape[:-1] if len(self.shape) < 2 else self.xshape[:-2]

    @property
    def chunks(self) -> int:
        """Number of chunks."""
        return math.prod(self.lead)

    @property
    def index_shape(self) -> tuple[int, ...]:
        """Shape of `sparse_idx`, which is uint8: wider indices are viewed as bytes."""
        return (*self.lead, self.k * index_dtype(self.totalk).itemsize)

    @property
    def value_shape(self) -> tuple[int, ...]:
        """Shape of `sparse_val`."""
        return (*self.lead, self.k)


class Layout:
    """The layouts of an optimiser's parameters and the chunk classes they form.

    Attributes:
        parameters: one `ParameterLayout` per parameter, in the optimiser's order.
        plans: one `ChunkPlan` per chunk shape, number of coefficients kept, dtype and device.
        state_dtypes: dtype of `delta`, one per plan.

    Args:
        parameters: see above.
        delta_dtype: dtype of `delta`; float64 parameters have float64 whatever it is.
        max_elements: a class of more is cut into several plans, between parameters.
        transform: False for plans without a basis, whose coefficients are the chunks themselves.
    """

    def __init__(
        self,
        parameters: Sequence[ParameterLayout],
        *,
        delta_dtype: torch.dtype = torch.float32,
        max_elements: int | None = None,
        transform: bool = True,
    ) -> None:
        self.parameters = tuple(parameters)
        self._transform = transform
        classes: dict[tuple[int, int, int, torch.dtype, torch.device], list[int]] = {}
        for position, p in enumerate(self.parameters):
            classes.setdefault((p.h, p.w, p.k, p.dtype, p.device), []).append(position)
        self.plans = tuple(
            self._plan(run)
            for positions in classes.values()
            for run in self._runs(positions, max_elements)
        )
        self.state_dtypes = tuple(
            torch.float64 if plan.dtype == torch.float64 else delta_dtype for plan in self.plans
        )

    def _runs(self, positions: list[int], limit: int | None) -> Iterator[list[int]]:
        run: list[int] = []
        elements = 0
        for position in positions:
            size = self.parameters[position].chunks * self.parameters[position].totalk
            if run and limit is not None and elements + size > limit:
                yield run
                run, elements = [], 0
            run.append(position)
            elements += size
        yield run

    def _plan(self, positions: Sequence[int]) -> ChunkPlan:
        first = self.parameters[positions[0]]
        members, start = [], 0
        for position in positions:
            p = self.parameters[position]
            members.append(Member(position, p.lead, start, p.chunks))
            start += p.chunks
        compute = torch.float64 if first.dtype == torch.float64 else torch.float32
        on_cpu = first.device.type == "cpu"
        limit = MAX_SLICE_ELEMENTS_CPU if on_cpu else MAX_SLICE_ELEMENTS
        if self._transform:
            basis_h = dct_basis(first.h, compute, first.device)
            basis_w = dct_basis(first.w, compute, first.device)
        else:
            basis_h = basis_w = torch.empty(0, 0, dtype=compute, device=first.device)
        return ChunkPlan(
            h=first.h,
            w=first.w,
            k=first.k,
            dtype=first.dtype,
            compute_dtype=compute,
            device=first.device,
            basis_h=basis_h,
            basis_w=basis_w,
            rows_h=basis_h.t().contiguous(),
            rows_w=basis_w.t().contiguous(),
            members=tuple(members),
            slices=cut_slices(members, first.totalk, limit),
        )

    def zeros(self, *, on_host: bool = False) -> list[Tensor]:
        """Fresh state, one chunk-major `[chunks, h, w]` buffer per plan.

        Args:
            on_host: in host memory, pinned for plans of a GPU.
        """
        return [
            torch.zeros(
                plan.chunks,
                plan.h,
                plan.w,
                dtype=dtype,
                device="cpu" if on_host else plan.device,
                pin_memory=on_host and plan.device.type == "cuda",
            )
            for plan, dtype in zip(self.plans, self.state_dtypes, strict=True)
        ]

    def views(self, buffers: Sequence[Tensor]) -> list[Tensor]:
        """Views of chunk-major buffers, one per parameter in the encoded shape `xshape`."""
        views: dict[int, Tensor] = {}
        for plan, buffer in zip(self.plans, buffers, strict=True):
            for m in plan.members:
                chunks = buffer[m.start : m.start + m.count]
                views[m.position] = chunks.view(self.parameters[m.position].xshape)
        return [views[i] for i in range(len(self.parameters))]


class Momentum:
    """Delta, one chunk-major buffer per plan of a layout.

    Args:
        layout: how the parameters are cut.
        offload: keep delta in host memory (pinned where the device is a GPU) and bring one plan's
            at a time to the device, as wide as `Layout`'s `max_elements` lets a plan be. Copies run
            on the device's current stream, in the order of what uses them.
    """

    def __init__(self, layout: Layout, *, offload: bool = False) -> None:
        self._layout, self._offload = layout, offload
        self._buffers = layout.zeros(on_host=offload)
        self._views = layout.views(self._buffers)

    def fetch(self, at: int) -> Tensor:
        """A plan's delta `[chunks, h, w]` on its device; what is changed in it is to be kept."""
        buffer = self._buffers[at]
        if not self._offload:
            return buffer
        return buffer.to(self._layout.plans[at].device, non_blocking=True, copy=True)

    def keep(self, at: int, delta: Tensor) -> None:
        """Take back what `fetch` gave."""
        if self._offload:
            self._buffers[at].copy_(delta, non_blocking=True)

    def of_parameter(self, position: int) -> Tensor:
        """One parameter's delta in the encoded shape: a view, or a copy on the device."""
        view = self._views[position]
        if not self._offload:
            return view
        return view.to(self._layout.parameters[position].device, copy=True)

    def set(self, position: int, delta: Tensor) -> None:
        """Give one parameter's delta other values, in any shape."""
        self._views[position].copy_(delta.view(self._views[position].shape))

    def buffers(self) -> list[Tensor]:
        """The state itself, one per plan: `[chunks, h, w]`, in host memory where offloaded."""
        if self._offload and any(plan.device.type == "cuda" for plan in self._layout.plans):
            torch.cuda.current_stream().synchronize()  # copies to the host may be under way
        return self._buffers

    def zero(self) -> None:
        """Forget all."""
        for buffer in self.buffers():
            buffer.zero_()


def warn_of_tiny_chunks(parameters: Sequence[ParameterLayout], compression_chunk: int) -> None:
    """Log one warning naming the parameters that have no useful divisor, and what they send."""
    tiny = []
    for p in parameters:
        sizes = p.shape[-2:] if p.shape else (1,)
        ideal = math.prod(min(n, compression_chunk) for n in sizes)
        if p.totalk * _DEGENERATE_FACTOR <= ideal:
            tiny.append(
                f"{p.name} {list(p.shape)} (chunks of {p.h} x {p.w}, sends {p.k / p.totalk:.0%})"
            )
    if tiny:
        logger.warning(
            "DisTrO compresses %d parameter(s) badly: a dimension has no divisor near "
            "compression_chunk=%d, so their "
            "chunks are tiny and a large share of their coefficients is sent with every result: %s",
            len(tiny),
            compression_chunk,
            "; ".join(tiny),
        )


def check_compression(decay: float, topk: int, chunk: int, weight_decay: float) -> None:
    """Check the numbers that `Distro` and `DeMo` share.

    Raises:
        ValueError: naming the argument.
    """
    if not 0 <= decay < 1:
        raise ValueError(f"compression_decay must be at least 0 and below 1, got {decay}")
    if topk <= 0:
        raise ValueError(f"compression_topk must be positive, got {topk}")
    if chunk <= 0:
        raise ValueError(f"compression_chunk must be positive, got {chunk}")
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay must be a number and not negative, got {weight_decay}")


def check_delta_shape(parameter: ParameterLayout, delta: Tensor, kind: str = "delta") -> None:
    """Check that a saved delta, or another kind of state, has its parameter's encoded shape.

    Raises:
        ValueError: it has not; the parameter is named.
    """
    if tuple(delta.shape) != parameter.xshape:
        raise ValueError(
            f"{kind} of parameter {parameter.name} is cut as {list(delta.shape)} "
            "in the saved state, but as "
            f"{list(parameter.xshape)} in this run (its shape or compression_chunk differs)"
        )


@lru_cache(maxsize=256)
def dct_basis(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`F[j, b] = s_b cos(pi (2j + 1) b / 2n)` with `s_0 = sqrt(1/n)`, otherwise `sqrt(2/n)`.

    Computed in float64 with the angle brought into the first quadrant by integer arithmetic, so
    that entries that vanish are exactly zero and entries of equal magnitude are equal: patterns
    that cancel then cancel exactly.

    Args:
        n: side of the chunk, at least 1.
        dtype: floating-point dtype of the result.
        device: where the result lives.

    Returns:
        `[n, n]`, shared between callers: not to be written to.
    """
    rows = [[_scale(n, b) * cosine((2 * j + 1) * b, n) for b in range(n)] for j in range(n)]
    return torch.tensor(rows, dtype=torch.float64).to(device=device, dtype=dtype)


def _scale(n: int, b: int) -> float:
    return math.sqrt((1 if b == 0 else 2) / n)
