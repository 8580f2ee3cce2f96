"""What launchers share: bases, address tables, rates, scratch memory, grids.

Everything that does not change from step to step is worked out once per chunk class and kept for as
long as its plan lives. Tables of addresses are kept by the addresses themselves: tensors that come
back at the same address, as gradients do from a caching allocator, are not looked at again.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from psyche_fast.integers import integer_basis, limbs
from psyche_fast.kernels import tuning
from psyche_fast.kernels.plan import ChunkPlan, Member, Rates

DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
_TABLES_KEPT = 8
_RATES_KEPT = 32
_INTERPRETED_PROGRAMS = 2  # more than one, so that a persistent loop is one in tests too

OUTER_KINDS = ("shared parameter", "momentum", "own parameter", "sent parameter")
"""Tensors of the outer step, for messages."""
MOST_ROUNDS = 64
"""Up to this many entries per chunk are selected one by one; more by bisection."""
OWN_ENTRIES = 16
"""Own entries that are decoded at once: the depth of one matrix instruction."""
ROWS_PER_TILE = 64
"""Chunks with one dimension that make up a tile."""
TILE_ELEMENTS = 4096
"""Elements of a tile of chunks that are not transformed."""
ROW_ENTRIES = 16
"""Entries of each row that are handled at once."""


@dataclass(frozen=True)
class Members:
    """The tensors of a class's members as a kernel reads them.

    Attributes:
        addresses: int64 `[members, 2]` on the device: address (0: none) and row stride.
        table: int64 `[chunks, 2]` on the device: member, and offset of the chunk in elements.
        dtype: of the tensors.
        aligned: whether vector accesses of 16 bytes are possible.
    """

    addresses: Tensor
    table: Tensor
    dtype: tl.dtype
    aligned: bool


class StreamOrder:
    """The rule for memory that launches share: only those of one stream are in an order."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None

    def enter(self, device: torch.device) -> None:
        """Take note of the stream that the next launch goes to.

        Raises:
            RuntimeError: the last launch went to another stream, which is still at work; or the
                stream is being captured.
        """
        stream, before = current_stream(device), self._stream
        if before is not None and before != stream and not before.query():
            raise RuntimeError(
                "an optimiser is used from two CUDA streams at once: call torch.cuda.synchronize() "
                "before its steps move to another stream, or make an optimiser for each"
            )
        self._stream = stream


class Planned:
    """One chunk class, prepared for launching."""

    def __init__(self, plan: ChunkPlan) -> None:
        self._plan = weakref.ref(plan)
        self.chunks = plan.chunks
        self.is_rows = plan.h == 1 or plan.w == 1
        self.length = plan.h * plan.w
        self.strided = plan.w == 1 and plan.h > 1
        self.H, self.W = padded(plan.h), padded(plan.w)
        if self.is_rows:
            self.W = padded(self.length)
        self.rows_per_tile = ROWS_PER_TILE
        if plan.is_transformed:
            self._prepare_bases(plan)
        else:
            self.rows_per_tile = max(1, TILE_ELEMENTS // padded(self.length))
        self.zeros = torch.zeros(self.W, dtype=torch.int32, device=plan.device)
        self._tables: OrderedDict[tuple[Any, ...], Tensor] = OrderedDict()
        self._members: OrderedDict[tuple[Any, ...], Members] = OrderedDict()
        self._scratch: dict[tuple[torch.dtype, int], Tensor] = {}
        self.order = StreamOrder()

    def _prepare_bases(self, plan: ChunkPlan) -> None:
        if self.is_rows:
            basis = plan.basis_h if self.strided else plan.basis_w
            parts = [_split(basis, self.W), _split(basis.t(), self.W)]
            self.forward_basis = self.inverse_basis = torch.cat(parts)
            tables = [_limbs(self.length, self.W, transposed=True)]
        else:
            parts = [_split(plan.basis_h.t(), self.H), _split(plan.basis_w, self.W)]
            self.forward_basis = torch.cat(parts)
            parts = [_split(plan.basis_h, self.H), _split(plan.basis_w.t(), self.W)]
            self.inverse_basis = torch.cat(parts)
            tables = [_limbs(plan.h, self.H), _limbs(plan.w, self.W, transposed=True)]
        table = torch.cat(tables)
        if plan.device.type == "cuda":
            table = table.pin_memory().to(plan.device, non_blocking=True)
        self.limbs = table
        self.rows_h = _pad(plan.rows_h, self.H)
        self.rows_w = _pad(plan.rows_w, padded(plan.w))

    def members(self, tensors: Sequence[Tensor | None], what: str) -> Members:
        """Find a class's tensors, one per member.

        Raises:
            ValueError: a tensor's elements do not lie as rows of neighbours, or it has another
                shape, dtype or device than the class; `what` and its number are named.
        """
        key = tuple(
            None if t is None else (t.data_ptr(), t.dtype, t.shape, t.stride()) for t in tensors
        )
        known = self._members.get(key)
        if known is None:
            known = self._members[key] = self._find(tensors, what)
            if len(self._members) > _TABLES_KEPT:
                self._members.popitem(last=False)
        else:
            self._members.move_to_end(key)
        return known

    def scratch(self, dtype: torch.dtype, size: int, device: torch.device) -> Tensor:
        """Memory that kernels of this class leave zero, or whose content is of no account."""
        key = (dtype, size)
        if key not in self._scratch:
            self._scratch[key] = torch.zeros(size, dtype=dtype, device=device)
        return self._scratch[key]

    def _find(self, tensors: Sequence[Tensor | None], what: str) -> Members:
        plan = self._plan()
        assert plan is not None
        assert len(tensors) == len(plan.members)
        addresses, strides = [], []
        aligned = plan.w % 8 == 0
        for member, tensor in zip(plan.members, tensors, strict=True):
            where = f"{what} number {member.position}"
            if tensor is not None:
                wanted = _shape(plan, member)
                if (tuple(tensor.shape) or (1,)) != wanted:
                    raise ValueError(
                        f"{where} has shape {list(tensor.shape)}, its parameter {list(wanted)}"
                    )
                wanted_dtypes = {
                    "look-ahead": [plan.dtype],
                    "parameter": [plan.dtype, torch.float32],
                    "anchor": [torch.float32],
                    **{kind: [torch.float32] for kind in OUTER_KINDS},
                }
                if tensor.dtype not in wanted_dtypes.get(what, DTYPES):
                    raise ValueError(f"{where} is {tensor.dtype}, its class {plan.dtype}")
            if tensor is None or tensor.numel() == 0:
                addresses += [0, 0]
                strides.append((0,) * (len(member.lead) + 1))
                continue
            if tensor.device != plan.device:
                raise ValueError(f"{where} is on {tensor.device}, its parameter on {plan.device}")
            steps = tensor.stride() or (1,)
            if steps[-1] != 1 and tensor.shape[-1:] != (1,):
                raise ValueError(
                    f"{where}, shape {list(tensor.shape)}, strides {list(tensor.stride())}: the "
                    "elements of a row must lie side by side"
                )
            if len(steps) > 1 and steps[-2] * 64 >= 1 << 31:
                raise ValueError(f"{where}: rows are {steps[-2]} elements apart, which is too far")
            row = steps[-2] if len(steps) > 1 else 0
            strides.append((*steps[:-1], 1))
            addresses += [tensor.data_ptr(), row]
            # A row stride only matters where there is more than one row, and so on.
            sizes = tensor.shape or (1,)
            spread = [s for s, n in zip(steps[:-1], sizes[:-1], strict=True) if n > 1]
            aligned &= tensor.data_ptr() % 16 == 0 and all(s % 8 == 0 for s in spread)
            if row % 8:
                aligned = False
        dtypes = {t.dtype for t in tensors if t is not None} or {torch.float32}
        assert len(dtypes) == 1, f"{what}s of one class are of one dtype"
        device_addresses = _upload(addresses, plan.device).view(-1, 2)
        table = self._table(plan, tuple(strides))
        return Members(device_addresses, table, DTYPES[dtypes.pop()], aligned)

    def _table(self, plan: ChunkPlan, strides: tuple[tuple[int, ...], ...]) -> Tensor:
        known = self._tables.get(strides)
        if known is not None:
            return known
        parts = []
        for number, (member, steps) in enumerate(zip(plan.members, strides, strict=True)):
            # lead is (..., rows of chunks, columns of chunks), or (chunks,) of a vector
            sides = (*(1 for _ in member.lead[:-2]), plan.h, plan.w)[-len(member.lead) :]
            offset = torch.zeros(member.lead, dtype=torch.int64)
            for dim, (count, step, side) in enumerate(
                zip(member.lead, steps[-len(member.lead) :], sides, strict=True)
            ):
                shape = [1] * len(member.lead)
                shape[dim] = count
                offset += (torch.arange(count) * (step * side)).view(shape)
            flat = offset.view(-1)
            parts.append(torch.stack([torch.full_like(flat, number), flat], dim=1))
        table = torch.cat(parts)
        if plan.device.type == "cuda":
            table = table.pin_memory().to(plan.device, non_blocking=True)
        self._tables[strides] = table
        if len(self._tables) > _TABLES_KEPT:
            self._tables.popitem(last=False)
        return table


def _shape(plan: ChunkPlan, member: Member) -> tuple[int, ...]:
    """Shape of a member's tensors; `(1,)` stands for `()` too."""
    if len(member.lead) == 1:
        return (member.lead[0] * plan.w,)
    *lead, rows, columns = member.lead
    return (*lead, rows * plan.h, columns * plan.w)


_planned: weakref.WeakKeyDictionary[ChunkPlan, Planned] = weakref.WeakKeyDictionary()


def planned(plan: ChunkPlan) -> Planned:
    """The prepared class for a launch on the current stream, prepared on first use.

    Raises:
        RuntimeError: as `StreamOrder.enter`.
    """
    known = _planned.get(plan)
    if known is None:
        known = _planned[plan] = Planned(plan)
    known.order.enter(plan.device)
    return known


def padded(n: int) -> int:
    """Side of the block that holds `n`: a power of two that matrix units take."""
    return max(16, triton.next_power_of_2(n))


def programs(device: torch.device, per_sm: int, work: int) -> int:
    """Programs of a persistent grid for `work` pieces of work."""
    if device.type != "cuda":
        return max(1, min(_INTERPRETED_PROGRAMS, work))
    return max(1, min(_multiprocessors(device) * per_sm, work))


def launch_options(kernel: str, device: torch.device) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of a kernel: those that Triton takes, and the kernel's own."""
    own = dict(tuning.options(kernel, device))
    ours = {"num_stages": 1, "enable_fp_fusion": False, "num_warps": own.pop("num_warps")}
    maxnreg = own.pop("maxnreg", None)
    if maxnreg is not None and torch.version.hip is None:
        ours["maxnreg"] = maxnreg
    return ours, own


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Within, launches go to the device, whichever is the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def cpu_launch_options(kernel: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The defaults of `launch_options`, for compiling without a GPU."""
    return launch_options(kernel, torch.device("cpu"))


def encode_constants(k: int, m: int) -> dict[str, Any]:
    """Constants of `encode_tiles` that follow from the numbers of entries, new and previous."""
    return {
        "K": k,
        "KP": max(2, triton.next_power_of_2(k)),
        "M": m,
        "MP": triton.cdiv(m, OWN_ENTRIES) * OWN_ENTRIES,
        "MC": OWN_ENTRIES,
        "ROUNDS": k <= MOST_ROUNDS,
    }


def entries_at_once(m: int, most: int, scattered: int | None = None) -> tuple[int, bool]:
    """Entries of a tile that `apply_tiles` handles at once, and whether by their places alone.

    So it is where these are all, and no more than `scattered`.
    """
    every = padded(m)
    return min(every, most), every <= (most if scattered is None else min(most, scattered))


_rates: OrderedDict[tuple[Any, ...], Tensor] = OrderedDict()


def rates(values: Rates | None, device: torch.device) -> tuple[Tensor, int]:
    """Rates on the device, float32, and the step from one member's to the next one's."""
    if isinstance(values, Tensor):
        assert values.dtype == torch.float32
        return values, 0 if values.numel() == 1 else values.stride(0)
    numbers = (1.0,) if values is None else tuple(values)
    if len(set(numbers)) == 1:
        numbers = numbers[:1]
    step = 0 if len(numbers) == 1 else 1
    # By stream, since none waits for what another one uploads.
    key = (numbers, device, current_stream(device))
    known = _rates.get(key)
    if known is None:
        if step == 0:
            known = torch.full((1,), numbers[0], dtype=torch.float32, device=device)
        else:
            known = _upload(numbers, device, torch.float32)
        _rates[key] = known
        if len(_rates) > _RATES_KEPT:
            _rates.popitem(last=False)
    else:
        _rates.move_to_end(key)
    return known, step


def _upload(
    values: Sequence[float], device: torch.device, dtype: torch.dtype = torch.int64
) -> Tensor:
    """A tensor on the device, without waiting for it."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    host = torch.tensor(values, dtype=dtype, pin_memory=True)
    return host.to(device, non_blocking=True)


def current_stream(device: torch.device) -> torch.cuda.Stream | None:
    """The stream that launches go to; None where there are none.

    Raises:
        RuntimeError: it is being captured: tables and scratch memory would not outlive the graph.
    """
    if device.type != "cuda":
        return None
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("an optimiser's step cannot be captured in a CUDA graph")
    return torch.cuda.current_stream(device)


def uniform(gradients: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """Gradients as the kernels read them: rows of neighbours, all of one dtype."""
    dtypes = {g.dtype for g in gradients if g is not None}
    if len(dtypes) > 1 or torch.float64 in dtypes:
        gradients = [None if g is None else g.to(torch.float32) for g in gradients]
    return [
        g.contiguous() if g is not None and g.dim() and g.stride(-1) != 1 else g for g in gradients
    ]


def written(*tensors: Tensor | None) -> None:
    """Tells autograd that tensors have changed, as torch's own operations do.

    The kernels write to addresses: a backward that has saved a tensor would take the new values for
    the old ones without a word.
    """
    increment_version([t for t in tensors if t is not None])


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _pad(matrix: Tensor, side: int) -> Tensor:
    full = torch.zeros(side, side, dtype=torch.float32, device=matrix.device)
    full[: matrix.shape[0], : matrix.shape[1]] = matrix
    return full


def _limbs(n: int, side: int, *, transposed: bool = False) -> Tensor:
    """Limbs of `B_n` or its transpose, fp16 `[2 * side * side]`."""
    basis = integer_basis(n)
    parts = limbs(basis.t() if transposed else basis)
    return torch.cat([_pad(part.float(), side).half().view(-1) for part in parts])


def _split(matrix: Tensor, side: int) -> Tensor:
    """High and low bfloat16 part, `[2 * side * side]`."""
    full = _pad(matrix, side)
    high = full.bfloat16()
    return torch.cat([high.view(-1), (full - high.float()).bfloat16().view(-1)])
