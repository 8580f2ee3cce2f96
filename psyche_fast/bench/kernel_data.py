"""Random data for the cases of `kernel_cases.py`, and what a case is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from psyche_fast.bench.kernel_checks import RATE
from psyche_fast.bench.plain_demo import CHUNK
from psyche_fast.bench.shapes import Shapes, elements
from psyche_fast.distro.chunks import Layout, ParameterLayout
from psyche_fast.kernels.plan import ChunkPlan, Entries


class Data:
    """Random parameters of one dtype, gradients and state, each made when first asked for.

    Args:
        shapes: of the parameters.
        device: where they are.
        dtype: of parameters and values.
        drawn_on: where random numbers are drawn, `device` unless told otherwise: those of a GPU are
            not those of a CPU.
    """

    def __init__(
        self,
        shapes: Shapes,
        device: torch.device,
        dtype: torch.dtype,
        *,
        drawn_on: torch.device | None = None,
    ) -> None:
        self.shapes, self.device, self.dtype = shapes, device, dtype
        self.elements = elements(shapes)
        self._drawn_on = drawn_on or device
        self._generator = torch.Generator(self._drawn_on).manual_seed(0)
        self._tensors: dict[tuple[str, torch.dtype], list[Tensor]] = {}

    def layout(self, k: int) -> Layout:
        """Chunk classes with `k` entries per chunk; the classes are the same for every `k`."""
        return Layout(
            [
                ParameterLayout.of(
                    str(i),
                    shape,
                    self.dtype,
                    self.device,
                    compression_chunk=CHUNK,
                    compression_topk=k,
                )
                for i, shape in enumerate(self.shapes)
            ]
        )

    def tensors(self, what: str, dtype: torch.dtype, scale: float) -> list[Tensor]:
        """One tensor per parameter, normally distributed."""
        if (what, dtype) not in self._tensors:
            self._tensors[what, dtype] = [
                self.fill(torch.empty(s, dtype=dtype, device=self.device), scale)
                for s in self.shapes
            ]
        return self._tensors[what, dtype]

    def state(self, dtype: torch.dtype) -> list[Tensor]:
        """One tensor `[chunks, h, w]` per class."""
        if ("state", dtype) not in self._tensors:
            self._tensors["state", dtype] = [
                self.fill(
                    torch.empty(p.chunks, p.h, p.w, dtype=dtype, device=self.device), RATE
                )
                for p in self.layout(1).plans
            ]  # fmt: skip
        return self._tensors["state", dtype]

    def fill(self, tensor: Tensor, scale: float) -> Tensor:
        """Fill with normally distributed numbers."""
        drawn = tensor
        if self._drawn_on != self.device:
            drawn = torch.empty_like(tensor, device=self._drawn_on)
        drawn.normal_(0.0, scale, generator=self._generator)
        return drawn if drawn is tensor else tensor.copy_(drawn)

    def renew(self, *lists: Sequence[Tensor]) -> None:
        """Draw parameters or state anew: a thousand timed runs have driven them far off."""
        for tensor in chain(*lists):
            self.fill(tensor, RATE if tensor.dim() == 3 else 0.01)

    def entries(self, plan: ChunkPlan, peers: int, *, signs: bool) -> Entries:
        """What peers might send: `plan.k` distinct, ascending indices each."""
        step = plan.totalk // plan.k
        shape = (plan.chunks, peers, plan.k)
        options: dict[str, Any] = {"device": self._drawn_on, "generator": self._generator}
        index = torch.randint(0, step, shape, dtype=torch.int32, **options)
        index += step * torch.arange(plan.k, dtype=torch.int32, device=self._drawn_on)
        if signs:
            values = torch.randint(0, 2, shape, dtype=torch.uint8, **options).view(torch.bool)
        else:
            values = self.fill(torch.empty(shape, dtype=self.dtype, device=self.device), RATE)
        flat = (plan.chunks, peers * plan.k)
        index = index.to(plan.index_dtype).view(flat).to(self.device)
        return Entries(index, values.view(flat).to(self.device), peers == 1)


@dataclass
class Work:
    """A case on a layer set.

    Attributes:
        calls: by implementation, what is timed.
        check: given an implementation's name, runs it once; figures, and whether they are right.
        bytes: the least that has to be read and written.
        elements: what times are told by; the layers' parameters where None.
    """

    calls: dict[str, Callable[[], Any]]
    check: Callable[[str], dict[str, Any]]
    bytes: int
    elements: int | None = None


def entry_bytes(plan: ChunkPlan, per_chunk: int, signs: bool) -> int:
    """Bytes of a class's entries, `per_chunk` of them for every chunk."""
    value = 1 if signs else plan.dtype.itemsize
    return plan.chunks * per_chunk * (plan.index_dtype.itemsize + value)
