"""DisTrO results as Psyche sends and keeps them: postcard, byte for byte.

A result is four fields: `sparse_idx` and `sparse_val` as tensors (`psyche/postcard.py`), `xshape`
as u16s, `totalk` as u32.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from psyche_fast.distro.results import DistroResult
from psyche_fast.psyche.postcard import BOOL, MOST_DIMENSIONS, Reader, varint, whole
from psyche_fast.psyche.postcard import SerializableTensor as SerializableTensor

_INDICES: dict[int, np.dtype[Any]] = {
    0: np.dtype("u1"), 4: np.dtype("<i8"), 27: np.dtype("<u2"), 28: np.dtype("<u4"),
}  # fmt: skip
_VALUES = {5, 6, 7, BOOL, 15}

# What `gradient` decodes: chunks of 256 x 256 of which one coefficient is kept are within this, and
# nobody sends more out of so little but to fill somebody's memory.
_MOST_SIDE = 1024
_MOST_GROWTH = 1 << 15


@dataclass(frozen=True, slots=True)
class SerializedDistroResult:
    """One parameter's compressed update.

    Attributes:
        sparse_idx: uint8 `[..., k]`, or viewed as bytes `[..., 2k]` or `[..., 4k]` where `totalk`
            asks for wider ones, as `DistroResult` has it; uint16, uint32 and int64 `[..., k]` too.
        sparse_val: bool (True = negative) or floating point `[..., k]`.
        xshape: encoded shape, `[..., R/h, C/w, h, w]`, or `[N/w, w]` for a vector.
        totalk: coefficients per chunk.

    Raises:
        ValueError: these do not go together, or an index is not below `totalk`.
    """

    sparse_idx: SerializableTensor
    sparse_val: SerializableTensor
    xshape: tuple[int, ...]
    totalk: int

    def __post_init__(self) -> None:
        idx, val = self.sparse_idx, self.sparse_val
        if idx.kind not in _INDICES:
            raise ValueError(f"sparse_idx is {idx.dtype}, wanted uint8, uint16, uint32 or int64")
        if val.kind not in _VALUES:
            raise ValueError(f"sparse_val is {val.dtype}, wanted bool or floating point")
        if not 1 <= len(self.xshape) <= MOST_DIMENSIONS:
            raise ValueError(f"xshape has {len(self.xshape)} dimensions")
        *lead, last = self.xshape
        if len(self.xshape) > 2:
            last *= lead.pop()
        if self.totalk != last or not 1 <= last < 1 << 32:
            raise ValueError(f"totalk is {self.totalk}, xshape is {list(self.xshape)}")
        if not val.dims or not 1 <= val.dims[-1] <= last:
            raise ValueError(f"sparse_val is {list(val.dims)}, chunks have {last} coefficients")
        # As in Psyche's own scatter, chunks may be missing.
        if len(val.dims) != len(lead) + 1 or any(
            n > most for n, most in zip(val.dims, lead, strict=False)
        ):
            raise ValueError(f"sparse_val is {list(val.dims)}, xshape is {list(self.xshape)}")
        if idx.dims != (*val.dims[:-1], val.dims[-1] * self.index_bytes // self._index.itemsize):
            raise ValueError(f"sparse_idx is {list(idx.dims)}, sparse_val is {list(val.dims)}")
        indices = self.indices()
        if indices.size and not 0 <= int(indices.min()) <= int(indices.max()) < last:
            raise ValueError(f"an index is not below totalk {last}")

    @property
    def _index(self) -> np.dtype[Any]:
        return _INDICES[self.sparse_idx.kind]

    @property
    def index_bytes(self) -> int:
        """Bytes of one index; where they are written as bytes, as many as `totalk` takes."""
        if self.sparse_idx.kind:
            return self._index.itemsize
        return next(size for size in (1, 2, 4) if self.totalk <= 1 << 8 * size)

    @property
    def k(self) -> int:
        """Coefficients that are sent of each chunk."""
        return self.sparse_val.dims[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        """The parameter's shape.

        Raises:
            ValueError: `xshape` is no encoded one.
        """
        if len(self.xshape) == 3:
            raise ValueError(f"xshape {list(self.xshape)} is no parameter's: it has 3 dimensions")
        if len(self.xshape) < 3:
            return (math.prod(self.xshape),)
        *lead, rows, columns, h, w = self.xshape
        return (*lead, rows * h, columns * w)

    @property
    def chunks(self) -> tuple[int, ...]:
        """Numbers of chunks, and a chunk's two sides; a vector's chunks have one row."""
        return self.xshape if len(self.xshape) > 2 else (*self.xshape[:-1], 1, self.totalk)

    def indices(self) -> np.ndarray:
        """The indices by value, `[..., k]`."""
        dtype = self._index if self.sparse_idx.kind else np.dtype(f"<u{self.index_bytes}")
        return np.frombuffer(self.sparse_idx.data, dtype).reshape(self.sparse_val.dims)

    @classmethod
    def of(cls, result: DistroResult) -> SerializedDistroResult:
        """From a result on any device.

        Raises:
            ValueError: it is malformed, or a size does not fit into the 16 bits that Psyche has.
        """
        if max(result.xshape, default=0) >= 1 << 16:
            raise ValueError(f"xshape {list(result.xshape)}: Psyche sends sizes below 65536")
        return cls(
            SerializableTensor.of(result.sparse_idx),
            SerializableTensor.of(result.sparse_val),
            tuple(result.xshape),
            result.totalk,
        )

    def result(self) -> DistroResult:
        """As our own optimiser takes it: indices in their bytes, on the CPU."""
        size = next(size for size in (1, 2, 4) if self.totalk <= 1 << 8 * size)
        narrow = self.indices().astype(f"<u{size}").view(np.uint8)
        idx = torch.from_numpy(narrow.reshape(*self.sparse_val.dims[:-1], self.k * size).copy())
        return DistroResult(idx, self.sparse_val.tensor().detach(), self.xshape, self.totalk)

    @classmethod
    def read(cls, reader: Reader) -> SerializedDistroResult:
        """Takes one off a buffer.

        Raises:
            ValueError: it is malformed.
        """
        idx, val = SerializableTensor.read(reader), SerializableTensor.read(reader)
        sizes = reader.length("xshape")
        if sizes > MOST_DIMENSIONS:
            raise reader.fail(f"xshape has {sizes} dimensions")
        xshape = tuple(reader.varint(16, "xshape") for _ in range(sizes))
        totalk = reader.varint(32, "totalk")
        try:
            return cls(idx, val, xshape, totalk)
        except ValueError as error:
            raise reader.fail(str(error)) from error

    @classmethod
    def from_bytes(cls, data: bytes | memoryview) -> SerializedDistroResult:
        """From the whole of a buffer.

        Raises:
            ValueError: it is malformed, or goes on.
        """
        return whole(data, cls.read)

    def to_bytes(self) -> bytes:
        """As it is sent."""
        return b"".join((
            self.sparse_idx.to_bytes(), self.sparse_val.to_bytes(),
            varint(len(self.xshape), 64, "xshape"),
            *(varint(n, 16, "xshape") for n in self.xshape),
            varint(self.totalk, 32, "totalk"),
        ))  # fmt: skip


@dataclass(frozen=True, slots=True)
class TransmittableDistroResult:
    """What a client sends of one batch.

    Attributes:
        step: the step.
        trainer_nonce: a number of the trainer's.
        batch_id: first and last sample.
        distro_results: one per parameter, in ascending byte order of the parameters' names.
    """

    step: int
    trainer_nonce: int
    batch_id: tuple[int, int]
    distro_results: tuple[SerializedDistroResult, ...]

    def commitment(self) -> bytes:
        """The 32 bytes that a client commits itself to before it sends this."""
        return commitment(self.step, self.batch_id, self.distro_results)

    @classmethod
    def read(cls, reader: Reader) -> TransmittableDistroResult:
        """Takes one off a buffer.

        Raises:
            ValueError: it is malformed.
        """
        step, nonce = reader.varint(32, "step"), reader.varint(32, "trainer_nonce")
        batch = reader.varint(64, "batch_id"), reader.varint(64, "batch_id")
        if batch[0] > batch[1]:
            raise reader.fail(f"batch_id {batch[0]} to {batch[1]} goes backwards")
        return cls(step, nonce, batch, tuple(read_list(reader)))

    @classmethod
    def from_bytes(cls, data: bytes | memoryview) -> TransmittableDistroResult:
        """From the whole of a buffer.

        Raises:
            ValueError: it is malformed, or goes on.
        """
        return whole(data, cls.read)

    def to_bytes(self) -> bytes:
        """As it is sent."""
        return b"".join((
            varint(self.step, 32, "step"), varint(self.trainer_nonce, 32, "trainer_nonce"),
            *(varint(n, 64, "batch_id") for n in self.batch_id),
            varint(len(self.distro_results), 64, "distro_results"),
            *(result.to_bytes() for result in self.distro_results),
        ))  # fmt: skip


def commitment(
    step: int, batch_id: tuple[int, int], results: Sequence[SerializedDistroResult]
) -> bytes:
    """SHA-256 of step, batch and the tensors' bytes; not of nonce, shapes and kinds."""
    digest = hashlib.sha256(step.to_bytes(4, "big"))
    for end in batch_id:
        digest.update(end.to_bytes(8, "big"))
    for result in results:
        digest.update(result.sparse_idx.data)
        digest.update(result.sparse_val.data)
    return digest.digest()


def read_dump(reader: Reader) -> list[SerializedDistroResult]:
    """Results one after the other to the end, as Psyche's clients write them to a folder.

    Raises:
        ValueError: one is malformed, or cut off.
    """
    results = []
    while reader.left:
        results.append(SerializedDistroResult.read(reader))
    return results


def read_list(reader: Reader) -> list[SerializedDistroResult]:
    """Results with their number in front.

    Raises:
        ValueError: one is malformed.
    """
    # Two tensors of four bytes at least, and two bytes.
    length = reader.length("distro_results", least=10)
    return [SerializedDistroResult.read(reader) for _ in range(length)]


def write_dump(results: Sequence[SerializedDistroResult]) -> bytes:
    """What `read_dump` reads."""
    return b"".join(result.to_bytes() for result in results)


def gradient(result: SerializedDistroResult) -> Tensor:
    """What a result says of its parameter's gradient: fp32, in the parameter's shape.

    Coefficients named twice count with their mean, as Psyche's scatter has it; then the inverse
    DCT. Its sign is what one peer alone would move the parameter by.

    Raises:
        ValueError: `xshape` is no encoded shape, chunks are larger than anybody's, what is promised
            is out of all proportion to what is there, or a value is not finite.
    """
    shape, values = result.shape, result.sparse_val.tensor().detach()
    elements, stored = math.prod(shape), len(result.sparse_idx.data) + len(result.sparse_val.data)
    *lead, h, w = result.chunks
    if max(h, w) > _MOST_SIDE:
        raise ValueError(f"chunks of {h} x {w}: up to {_MOST_SIDE} a side are decoded")
    if elements > _MOST_GROWTH * max(stored, 16):
        raise ValueError(f"{list(shape)} out of {stored} bytes is not decoded")
    signs = values.dtype == torch.bool
    values = values.to(torch.float32)
    if signs:
        values = 1 - 2 * values
    if not values.isfinite().all():
        raise ValueError("a value is not finite")
    chunks = torch.zeros(*lead, h * w)
    present = chunks[tuple(slice(n) for n in values.shape[:-1])]
    indices = torch.from_numpy(result.indices().astype(np.int64))
    present.scatter_reduce_(-1, indices, values, "mean", include_self=False)
    chunks = _waves(h) @ chunks.view(*lead, h, w) @ _waves(w).T
    return (chunks.transpose(-3, -2) if len(result.xshape) > 2 else chunks).reshape(shape)


def _waves(n: int) -> Tensor:
    """The DCT-II basis `[n, n]` in fp32, a frequency in each column.

    What `distro.chunks.dct_basis` gives, within rounding; that takes a second for a side of 1024,
    and a file may have chunks of every size.
    """
    angle = torch.outer(2 * torch.arange(n) + 1, torch.arange(n)) % (4 * n)
    waves = (angle.double() * (math.pi / (2 * n))).cos() * math.sqrt(2 / n)
    waves[:, 0] = math.sqrt(1 / n)
    return waves.float()
