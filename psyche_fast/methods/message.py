"""What a replica sends of a fragment: one message of fixed size, that says what it is.

A header of 40 bytes, little-endian, and then for every chunk class the scales, the selected entries
(`psyche_fast.kernels.pack`, with signs or values) and the further bits of their codes; zeros up to
a multiple of 8 bytes:

| bytes | what |
| --- | --- |
| 0 to 3 | `PFLM` |
| 4, 5 | version of this format, 1 |
| 6, 7 | number of the fragment |
| 8 to 15 | bytes after the header |
| 16 to 23 | hash of the method, the layout and the definition of directions |
| 24 to 27 | number of the round, modulo 2^32 |
| 28 to 31 | sender: its replica |
| 32 to 39 | checksum of the bytes after the header, as `distro/message.py` has it |
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from psyche_fast.distro.chunks import Layout
from psyche_fast.distro.message import hash_rows
from psyche_fast.integers import definition_hash
from psyche_fast.kernels import pack as wire
from psyche_fast.kernels.plan import ChunkPlan, Entries
from psyche_fast.methods.method import Method
from psyche_fast.methods.values import (
    PLANES,
    Codes,
    dequantise,
    lower_bytes,
    pack_bits,
    packed_bytes,
    quantise,
    scales_of,
    unpack_bits,
)

VERSION = 1
_MAGIC = b"PFLM"
_FIELDS = struct.Struct("<4sHHQQII")  # all but the checksum
_HEADER = _FIELDS.size + 8
_NAMES = ("magic", "version", "fragment", "size", "hash of method and layout", "round", "sender")


@dataclass(frozen=True)
class Picked:
    """What was selected of a chunk class, of one replica or of several.

    Attributes:
        indices: `[.., n, k]` in the class's index dtype; None where all replicas know them.
        values: `[.., n, k]` in the compute dtype.
    """

    indices: Tensor | None
    values: Tensor


class Format:
    """How a fragment's results travel, on the device of its first chunk class.

    Args:
        method: whose.
        layout: of the fragment's parameters.
        backends: resolved backend of every chunk class.
        fragment: its number.

    Attributes:
        size: bytes of a message.
    """

    def __init__(
        self, method: Method, layout: Layout, backends: Sequence[str], fragment: int
    ) -> None:
        self._kind, self._layout, self._backends = method.values, layout, tuple(backends)
        self._sent = tuple(_sent_plan(plan, method) for plan in layout.plans)
        self._device = layout.plans[0].device
        sizes = [self._entry_bytes(plan) + packed_bytes(plan, self._kind) for plan in self._sent]
        self._payload = sum(sizes) + -sum(sizes) % 8
        self.size = _HEADER + self._payload
        described = [(p.name, p.shape, p.h, p.w, p.k, str(p.dtype)) for p in layout.parameters]
        sides = [side for p in layout.plans if p.is_transformed for side in (p.h, p.w)]
        digest = hashlib.blake2b(
            repr((method.hash(), described, definition_hash(sides))).encode(), digest_size=8
        )
        self._hash, self._fragment = int.from_bytes(digest.digest(), "little"), fragment

    def pack(self, turn: int, sender: int, picked: Sequence[Picked]) -> tuple[Tensor, list[Tensor]]:
        """A message, uint8 `[size]`, and what its receivers see of the values of every class."""
        message = torch.zeros(self.size, dtype=torch.uint8, device=self._device)
        message[: _FIELDS.size] = self._fields(turn, sender)
        seen, at = [], _HEADER
        for plan, p, backend in zip(self._sent, picked, self._backends, strict=True):
            indices = p.indices
            if indices is None or plan.k == plan.totalk:  # not sent: all, or known to all
                indices = torch.arange(plan.k, device=plan.device).to(plan.index_dtype)
                indices = indices.expand(plan.chunks, plan.k)
            parts, values = self._parts(plan, indices, p.values, backend)
            seen.append(values)
            for part in parts:
                message[at : at + part.numel()] = part
                at += part.numel()
        words = message.view(torch.int64)
        words[_HEADER // 8 - 1] = hash_rows(words[None, _HEADER // 8 :])[0]
        return message, seen

    def faults(self, turn: int, messages: Tensor) -> dict[int, str]:
        """What is wrong with the header or the checksum of messages, `[peers, size]`.

        Raises:
            ValueError: messages of another shape or dtype.
        """
        if messages.dtype != torch.uint8 or messages.dim() != 2 or messages.shape[1] != self.size:
            raise ValueError(
                f"messages: wanted uint8 [replicas, {self.size}], got {messages.dtype} "
                f"{list(messages.shape)}"
            )
        words = messages.contiguous().view(torch.int64)
        good = hash_rows(words[:, _HEADER // 8 :]) == words[:, _HEADER // 8 - 1]
        faults = {}
        for row, is_whole in enumerate(good.tolist()):
            wanted = self._fields(turn, row).to(messages.device)
            if not torch.equal(messages[row, : _FIELDS.size], wanted):
                fields = _FIELDS.unpack(bytes(messages[row, : _FIELDS.size].tolist()))
                own = _FIELDS.unpack(bytes(wanted.tolist()))
                faults[row] = next(
                    f"its header has the {name} {theirs!r}, wanted {mine!r}"
                    for name, theirs, mine in zip(_NAMES, fields, own, strict=True)
                    if theirs != mine
                )
            elif not is_whole:
                faults[row] = "its checksum does not match its content"
        return faults

    def unpack(
        self, messages: Tensor, leave_out: Collection[int] = ()
    ) -> tuple[list[Picked] | None, dict[int, str]]:
        """What messages hold in which `faults` sees none.

        Args:
            messages: uint8 `[peers, size]`, on the layout's device.
            leave_out: rows that are not to be looked at.

        Returns:
            One `Picked` per chunk class, `[good ones, n, k]` in the order of the rows; None where
            there is no good one. And for each bad row what is wrong with it.
        """
        rows = [row for row in range(len(messages)) if row not in leave_out]
        if not rows:
            return None, {}
        picked, good = self._decode(messages[rows])
        faults = {
            row: "an index is out of order or range, or a value is not finite"
            for row, is_good in zip(rows, good.tolist(), strict=True)
            if not is_good
        }
        if len(faults) == len(rows):
            return None, faults
        if faults:
            picked, _ = self._decode(messages[rows][good])
        return picked, faults

    def _fields(self, turn: int, sender: int) -> Tensor:
        fields = _FIELDS.pack(
            _MAGIC, VERSION, self._fragment, self._payload, self._hash, turn % (1 << 32), sender
        )
        return torch.frombuffer(bytearray(fields), dtype=torch.uint8).to(self._device)

    def _values(self, plan: ChunkPlan) -> wire.Values:
        """What `kernels.pack` is told of a class's values."""
        if self._kind == "bf16":
            return torch.bfloat16
        return plan.dtype if self._kind == "parameter" else "sign"

    def _entry_bytes(self, plan: ChunkPlan) -> int:
        return wire.size(plan, self._values(plan))

    def _parts(
        self, plan: ChunkPlan, indices: Tensor, values: Tensor, backend: str
    ) -> tuple[list[Tensor], Tensor]:
        """The bytes of a class in their order, and its values as they arrive."""
        form = self._values(plan)
        if isinstance(form, torch.dtype):
            entries = Entries(indices, values, unique=True)
            return [wire.pack(plan, entries, form, backend=backend)], values.to(form).to(
                plan.compute_dtype
            )
        if self._kind == "sign":
            signs, others, seen = values < 0, [], torch.where(values < 0, -1.0, 1.0)
            seen = seen.to(plan.compute_dtype)
        else:
            codes = quantise(plan, self._kind, values)
            signs, seen = codes.upper, dequantise(plan, self._kind, codes)
            others = [
                codes.scales.contiguous().view(-1).view(torch.uint8),
                pack_bits(codes.lower, PLANES[self._kind]),
            ]
        packed = wire.pack(plan, Entries(indices, signs, unique=True), form, backend=backend)
        return [*others[:1], packed, *others[1:]], seen

    def _decode(self, messages: Tensor) -> tuple[list[Picked], Tensor]:
        """What well-formed rows hold, and which are: bool `[peers]`."""
        peers, picked, at = len(messages), [], _HEADER
        good = torch.ones(peers, dtype=torch.bool, device=messages.device)

        def take(count: int) -> Tensor:
            nonlocal at
            at += count
            return messages[:, at - count : at]

        for plan, backend in zip(self._sent, self._backends, strict=True):
            scales = None
            if self._kind in PLANES:
                dtype, shape = scales_of(plan, self._kind)
                # A copy is aligned, wherever in the message the bytes lie.
                data = take(dtype.itemsize * math.prod(shape)).flatten().clone()
                scales = data.view(dtype).view(peers, *shape)
                good &= scales.isfinite().flatten(1).all(1)
                if self._kind != "codebook4":
                    good &= (scales >= 0).flatten(1).all(1)
            form = self._values(plan)
            entries, valid = wire.unpack_checked(
                plan, take(self._entry_bytes(plan)), form, backend=backend
            )
            good &= valid.all(dim=1)
            shaped = (plan.chunks, peers, plan.k)
            values = entries.values.view(shaped).transpose(0, 1)
            if scales is not None:
                shape = (plan.chunks, plan.k)
                planes = take(lower_bytes(plan, self._kind))
                lower = unpack_bits(planes, PLANES[self._kind], shape)
                values = dequantise(plan, self._kind, Codes(values, lower, scales))
            elif values.dtype == torch.bool:
                values = 1 - 2 * values.to(plan.compute_dtype)
            else:
                values = values.to(plan.compute_dtype)
            known = plan.k == plan.totalk
            indices = None if known else entries.indices.view(shaped).transpose(0, 1)
            picked.append(Picked(indices, values))
        return picked, good


def _sent_plan(plan: ChunkPlan, method: Method) -> ChunkPlan:
    """A class as it travels: where all replicas know the positions, they are all that there is."""
    return replace(plan, h=1, w=plan.k) if method.select == "random" else plan
