"""What a kernel is told about the chunks it works on.

All chunks of one shape, dtype and device, whichever parameters they come from, form one *chunk
class*. A `ChunkPlan` describes a class once, when an optimiser is built; every operation takes the
plan and handles the whole class. State (`delta`) lives in *chunk-major* order, `[chunks, h, w]`, so
that the transform and the selection are contiguous over the class and only the gradient and the
parameter are read through a strided view.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from psyche_fast.devices import indexed

Rates: TypeAlias = Sequence[float] | Tensor
"""Learning rates or factors: a number per member, or a float32 tensor `[]` or `[members]` on the
members' device, which is not waited for."""

INDEX_DTYPES: tuple[tuple[int, torch.dtype], ...] = (
    (1 << 8, torch.uint8),
    (1 << 16, torch.uint16),
    (1 << 32, torch.uint32),
)


def single(rate: float | Tensor) -> float | Tensor:
    """A rate as float32 has it.

    What follows from it in float64 is then the same on all machines, though their cosines of a
    schedule may differ in the last bit.
    """
    return rate if isinstance(rate, Tensor) else ctypes.c_float(rate).value


def index_dtype(totalk: int) -> torch.dtype:
    """Smallest unsigned integer dtype that holds the flat indices `0 .. totalk - 1` of a chunk.

    Raises:
        ValueError: 32 bits do not hold them.
    """
    for limit, dtype in INDEX_DTYPES:
        if totalk <= limit:
            return dtype
    raise ValueError(f"a chunk may have at most 2^32 elements, got {totalk}")


@dataclass(frozen=True, slots=True)
class Member:
    """One parameter's part of a chunk class.

    Attributes:
        position: index of the parameter in the optimiser's list.
        lead: numbers of chunks, `(..., R/h, C/w)`, or `(N/w,)` for a vector.
        start: first chunk of the class that belongs to the parameter.
        count: number of its chunks.
    """

    position: int
    lead: tuple[int, ...]
    start: int
    count: int


@dataclass(frozen=True, slots=True)
class Piece:
    """A contiguous run of chunks `[start, stop)` of the class inside one parameter.

    `index` selects the run from the parameter's chunk view `[*lead, h, w]`; `lead` is its shape
    without `h, w`.
    """

    slot: int
    index: tuple[int | slice, ...]
    lead: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Slice:
    """Chunks `[start, stop)` handled together, to bound the workspace, and their pieces."""

    start: int
    stop: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, eq=False, slots=True, weakref_slot=True)
class ChunkPlan:
    """One chunk class: the `h x w` chunks of all parameters of one dtype on one device.

    Vectors have `h = 1`.

    Attributes:
        h: rows of a chunk.
        w: columns of a chunk.
        k: coefficients kept of each chunk, `1 <= k <= h * w`.
        dtype: dtype of the parameters, and of the values sent.
        compute_dtype: dtype of the arithmetic, float32 (float64 for float64 parameters).
        device: where parameters, state and basis live; always with its index.
        basis_h: DCT-II basis `[h, h]` in `compute_dtype`; both empty where nothing is transformed,
            which the plain backend alone can do.
        basis_w: DCT-II basis `[w, w]` in `compute_dtype`.
        rows_h: `basis_h` transposed, contiguous: one row per frequency, to be gathered.
        rows_w: `basis_w` transposed, contiguous.
        members: the parameters, in the optimiser's order. Operations take their tensors in this
            order.
        slices: the class cut in runs of bounded size.
    """

    h: int
    w: int
    k: int
    dtype: torch.dtype
    compute_dtype: torch.dtype
    device: torch.device
    basis_h: Tensor
    basis_w: Tensor
    rows_h: Tensor
    rows_w: Tensor
    members: tuple[Member, ...]
    slices: tuple[Slice, ...] = field(repr=False)

    def __post_init__(self) -> None:
        """Name the device as tensors do."""
        object.__setattr__(self, "device", indexed(self.device))

    @property
    def totalk(self) -> int:
        """Coefficients of a chunk, `h * w`."""
        return self.h * self.w

    @property
    def chunks(self) -> int:
        """Chunks of the class."""
        return self.members[-1].start + self.members[-1].count

    @property
    def is_transformed(self) -> bool:
        """Whether what is selected of a chunk are its DCT's coefficients."""
        return self.basis_w.numel() > 0

    @property
    def index_dtype(self) -> torch.dtype:
        """Unsigned dtype of the selected flat indices."""
        return index_dtype(self.totalk)


@dataclass(frozen=True, slots=True)
class Entries:
    """Selected coefficients of every chunk of a class.

    Attributes:
        indices: `[chunks, m]`, flat index within the chunk, in the class's unsigned index dtype.
        values: `[chunks, m]`, floating point, or bool (True = -1, False = +1).
        unique: no index occurs twice in a chunk. Otherwise a coefficient is the mean over the
            entries that name it.
    """

    indices: Tensor
    values: Tensor
    unique: bool = False


def chunk_view(tensor: Tensor, h: int, w: int) -> Tensor:
    """View a parameter as chunks `[..., R/h, C/w, h, w]`, a vector as `[N/w, 1, w]`."""
    if tensor.dim() < 2:
        return tensor.view(tensor.numel() // w, 1, w)
    *lead, rows, columns = tensor.shape
    return tensor.view(*lead, rows // h, h, columns // w, w).transpose(-3, -2)


def cut_slices(members: Sequence[Member], chunk_size: int, max_elements: int) -> tuple[Slice, ...]:
    """Cut a class, in order, into slices of at most `max_elements` or one chunk."""
    limit = max(1, max_elements // chunk_size)
    slices: list[Slice] = []
    pieces: list[Piece] = []
    for slot, member in enumerate(members):
        start = member.start
        for index, lead in _runs(member.lead, limit):
            stop = start + math.prod(lead)
            if pieces and stop - pieces[0].start > limit:
                slices.append(Slice(pieces[0].start, pieces[-1].stop, tuple(pieces)))
                pieces = []
            if stop > start:
                pieces.append(Piece(slot, index, lead, start, stop))
            start = stop
    if pieces:
        slices.append(Slice(pieces[0].start, pieces[-1].stop, tuple(pieces)))
    return tuple(slices)


def _runs(
    lead: tuple[int, ...], limit: int
) -> Iterator[tuple[tuple[int | slice, ...], tuple[int, ...]]]:
    """Index and shape of contiguous runs of at most `limit` chunks of a parameter."""
    if math.prod(lead) <= limit:
        yield (), lead
        return
    inner = math.prod(lead[1:])
    if inner <= limit:
        step = limit // inner
        for first in range(0, lead[0], step):
            last = min(first + step, lead[0])
            yield (slice(first, last),), (last - first, *lead[1:])
        return
    for i in range(lead[0]):
        for index, shape in _runs(lead[1:], limit):
            yield (i, *index), shape
