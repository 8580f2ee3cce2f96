"""Tensors as Psyche sends and keeps them: postcard, byte for byte.

A tensor is its dimensions as i64s, its kind (c10's number) in a byte, `requires_grad`, and its
bytes: little-endian, or eight bools in a byte, the first lowest. Integers wider than a byte are
varints, 7 bits in a byte, the lowest first, signed ones zigzag; lists and bytes have their length
in front.

Whatever is read may come from anybody: nothing is believed before the bytes for it are there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

BOOL = 11
KINDS: dict[int, torch.dtype] = {
    0: torch.uint8, 1: torch.int8, 2: torch.int16, 3: torch.int32, 4: torch.int64,
    5: torch.float16, 6: torch.float32, 7: torch.float64, BOOL: torch.bool, 15: torch.bfloat16,
    27: torch.uint16, 28: torch.uint32, 29: torch.uint64,
}  # fmt: skip
"""c10's numbers of the kinds that a dense tensor of Psyche's can have."""
_NUMBERS = {dtype: number for number, dtype in KINDS.items()}
MOST_DIMENSIONS = 64
_MOST_ELEMENTS = 1 << 60
T = TypeVar("T")


def varint(value: int, bits: int, what: str) -> bytes:
    """An unsigned varint.

    Raises:
        ValueError: more than `bits` bits.
    """
    if not 0 <= value < 1 << bits:
        raise ValueError(f"{what}: wanted a number in [0, 2^{bits}), got {value}")
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


class Reader:
    """Takes values off the front of a buffer.

    Attributes:
        at: bytes taken.
    """

    def __init__(self, data: bytes | memoryview) -> None:
        self._data = memoryview(data).cast("B")
        self.at = 0

    @property
    def left(self) -> int:
        """Bytes that have not been taken."""
        return len(self._data) - self.at

    def fail(self, what: str) -> ValueError:
        """What is wrong, and where."""
        return ValueError(f"byte {self.at}: {what}")

    def byte(self, what: str) -> int:
        """One byte."""
        return self.take(1, what)[0]

    def take(self, size: int, what: str) -> memoryview:
        """The next bytes, not copied."""
        if size > self.left:
            raise self.fail(f"{what} wants {size} more bytes, there are {self.left}")
        part = self._data[self.at : self.at + size]
        self.at += size
        return part

    def varint(self, bits: int, what: str) -> int:
        """An unsigned number of at most `bits` bits, in as few bytes as it takes."""
        value = 0
        for shift in range(0, bits, 7):
            byte = self.byte(what)
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                if value >> bits:
                    raise self.fail(f"{what} has more than {bits} bits")
                if byte == 0 and shift:
                    raise self.fail(f"{what} is written in more bytes than it takes")
                return value
        raise self.fail(f"{what} has more than {bits} bits")

    def signed(self, what: str) -> int:
        """An i64, zigzag."""
        value = self.varint(64, what)
        return (value >> 1) ^ -(value & 1)

    def boolean(self, what: str) -> bool:
        """A bool in a byte."""
        byte = self.byte(what)
        if byte > 1:
            raise self.fail(f"{what}: wanted 0 or 1, got {byte}")
        return byte == 1

    def length(self, what: str, *, least: int = 1) -> int:
        """The number of items to come, of at least `least` bytes each."""
        length = self.varint(64, f"the length of {what}")
        if length * least > self.left:
            raise self.fail(f"{what}: {length} items in the {self.left} bytes that are left")
        return length

    def end(self) -> None:
        """Checks that nothing is left."""
        if self.left:
            raise self.fail(f"{self.left} bytes too many")


def whole(data: bytes | memoryview, read: Callable[[Reader], T]) -> T:
    """Reads one value, and checks that nothing comes after it."""
    reader = Reader(data)
    value = read(reader)
    reader.end()
    return value


@dataclass(frozen=True, slots=True)
class SerializableTensor:
    """A tensor as bytes.

    Attributes:
        dims: its shape.
        kind: c10's number of its dtype, see `KINDS`.
        requires_grad: as it says.
        data: its elements, contiguous; bools packed.

    Raises:
        ValueError: `data` has not the length that the others promise, or what they say is no
            tensor's.
    """

    dims: tuple[int, ...]
    kind: int
    requires_grad: bool
    data: bytes

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind {self.kind} is none of {', '.join(map(str, KINDS))}")
        if self.requires_grad and not self.dtype.is_floating_point:
            raise ValueError(f"{self.dtype} with requires_grad")
        if len(self.dims) > MOST_DIMENSIONS:
            raise ValueError(f"{len(self.dims)} dimensions, at most {MOST_DIMENSIONS} are read")
        if min(self.dims, default=0) < 0:
            raise ValueError(f"a dimension is negative: {list(self.dims)}")
        if math.prod(max(n, 1) for n in self.dims) > _MOST_ELEMENTS:
            raise ValueError(f"more elements than a tensor can have: {list(self.dims)}")
        elements = math.prod(self.dims)
        wanted = elements * KINDS[self.kind].itemsize if self.kind != BOOL else -(-elements // 8)
        if len(self.data) != wanted:
            raise ValueError(
                f"{self.dtype} {list(self.dims)} is {wanted} bytes, there are {len(self.data)}"
            )
        if self.kind == BOOL and elements % 8 and self.data[-1] >> elements % 8:
            raise ValueError("bits after the last bool are not zero")

    @property
    def dtype(self) -> torch.dtype:
        """The tensor's."""
        return KINDS[self.kind]

    @classmethod
    def of(cls, tensor: Tensor) -> SerializableTensor:
        """From a tensor on any device.

        Raises:
            ValueError: a dtype that Psyche's form does not have.
        """
        if tensor.dtype not in _NUMBERS:
            raise ValueError(f"a tensor of {tensor.dtype} cannot be sent")
        # Flat: a view of a 0-d tensor as bytes is none.
        flat = tensor.detach().cpu().contiguous().view(-1)
        data = flat.view(torch.uint8).numpy()
        if tensor.dtype == torch.bool:
            data = np.packbits(data, bitorder="little")
        number = _NUMBERS[tensor.dtype]
        return cls(tuple(tensor.shape), number, tensor.requires_grad, data.tobytes())

    def tensor(self) -> Tensor:
        """The tensor, on the CPU."""
        raw = np.frombuffer(self.data, np.uint8)
        if self.kind == BOOL:
            raw = np.unpackbits(raw, count=math.prod(self.dims), bitorder="little")
        flat = torch.empty(math.prod(self.dims), dtype=self.dtype)
        flat.view(torch.uint8).numpy()[:] = raw
        return flat.view(self.dims).requires_grad_(self.requires_grad)

    @classmethod
    def read(cls, reader: Reader) -> SerializableTensor:
        """Takes one off a buffer.

        Raises:
            ValueError: it is malformed.
        """
        dimensions = reader.length("dims")
        if dimensions > MOST_DIMENSIONS:
            raise reader.fail(f"{dimensions} dimensions, at most {MOST_DIMENSIONS} are read")
        dims = tuple(reader.signed("a dimension") for _ in range(dimensions))
        kind = reader.byte("kind")
        requires_grad = reader.boolean("requires_grad")
        packed = reader.varint(32, "the form of the data")
        if packed != (kind == BOOL):
            raise reader.fail(f"kind {kind} in the form {packed}: bools are 1, the others 0")
        data = reader.take(reader.length("data"), "data")
        try:
            return cls(dims, kind, requires_grad, bytes(data))
        except ValueError as error:
            raise reader.fail(str(error)) from error

    @classmethod
    def from_bytes(cls, data: bytes | memoryview) -> SerializableTensor:
        """From the whole of a buffer.

        Raises:
            ValueError: it is malformed, or goes on.
        """
        return whole(data, cls.read)

    def to_bytes(self) -> bytes:
        """As it is sent."""
        dims = [varint((n << 1) ^ (n >> 63), 64, "dims") for n in self.dims]
        return b"".join((
            varint(len(dims), 64, "dims"), *dims,
            bytes((self.kind, self.requires_grad, self.kind == BOOL)),
            varint(len(self.data), 64, "data"), self.data,
        ))  # fmt: skip
