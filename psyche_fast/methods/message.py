"""What a replica sends of a fragment: one message of fixed size, that says what it is.

A header of 40 bytes, little-endian, and then for every chunk class the scales, the selected entries
(`psyche_fast.kernels.pack`, with signs, codes or values); zeros up to a multiple of 8 bytes:

| bytes | what |
| --- | --- |
| 0 to 3 | `PFLM` |
| 4, 5 | version of this format, 3 |
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
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from psyche_fast.distro.chunks import Layout
from psyche_fast.distro.message import hash_rows
from psyche_fast.integers import definition_hash
from psyche_fast.kernels import pack as wire
from psyche_fast.kernels.plan import ChunkPlan, Entries
from psyche_fast.kernels.quantise import Codes
from psyche_fast.methods.method import Method, Values
from psyche_fast.methods.values import BITS, coded, dequantise, scale_bytes, scales_of

VERSION = 3
_MAGIC = b"PFLM"
_FIELDS = struct.Struct("<4sHHQQII")  # all but the checksum
HEADER = _FIELDS.size + 8
MALFORMED = "an index is out of order or range, or a value is not finite"
_NAMES = ("magic", "version", "fragment", "size", "hash of method and layout", "round", "sender")


@dataclass(frozen=True)
class Picked:
    """What was selected of a chunk class, of one replica or of several.

    Attributes:
        indices: `[.., n, k]` in the class's index dtype; None where all replicas know them.
        values: `[.., n, k]` in the compute dtype; of what is to be sent also in that in which it
            travels.
        codes: of what is to be sent, where it has been quantised already; `values` are then of no
            account.
    """

    indices: Tensor | None
    values: Tensor
    codes: Codes | None = None


class Envelope:
    """Header and checksum around a fixed number of bytes.

    Args:
        payload: how many, without what fills them up.
        content: what they are; equal on sender and receiver, and hashed as its `repr` has it.
        fragment: its number.
        device: where messages are made.

    Attributes:
        size: bytes of a message.
        device: see above.
    """

    def __init__(self, payload: int, content: object, fragment: int, device: torch.device) -> None:
        self.size, self._fragment, self.device = enclosed(payload), fragment, device
        self._payload = self.size - HEADER
        digest = hashlib.blake2b(repr(content).encode(), digest_size=8).digest()
        self._hash = int.from_bytes(digest, "little")

    def seal(
        self, turn: int, sender: int, parts: Iterable[Tensor], message: Tensor | None = None
    ) -> Tensor:
        """A message, uint8 `[size]`, of parts of its payload in their order, each uint8 `[n]`.

        Args:
            turn: number of its round.
            sender: whose.
            parts: those that lie in `message` already are left there.
            message: uint8 `[size]` to write to; a new one where None.
        """
        if message is None:
            message = torch.empty(self.size, dtype=torch.uint8, device=self.device)
        message[: _FIELDS.size] = self._fields(turn, sender)
        at = HEADER
        for part in parts:
            own = message[at : at + part.numel()]
            if own.data_ptr() != part.data_ptr():
                own.copy_(part)
            at += part.numel()
        message[at:] = 0
        words = message.view(torch.int64)
        words[HEADER // 8 - 1] = hash_rows(words[None, HEADER // 8 :])[0]
        return message

    def faults(
        self, turn: int, messages: Tensor, senders: Sequence[int] | None = None
    ) -> dict[int, str]:
        """What is wrong with the header or the checksum of messages, by their rows.

        Args:
            turn: the number of their round.
            messages: uint8 `[peers, size]`.
            senders: the replica that each should be of; that of its row's number where None.

        Raises:
            ValueError: messages of another shape or dtype.
        """
        if messages.dtype != torch.uint8 or messages.dim() != 2 or messages.shape[1] != self.size:
            raise ValueError(
                f"messages: wanted uint8 [replicas, {self.size}], got {messages.dtype} "
                f"{list(messages.shape)}"
            )
        words = _words(messages)
        good = hash_rows(words[:, HEADER // 8 :]) == words[:, HEADER // 8 - 1]
        faults = {}
        for row, is_whole in enumerate(good.tolist()):
            wanted = self._fields(turn, row if senders is None else senders[row])
            wanted = wanted.to(messages.device)
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

    def _fields(self, turn: int, sender: int) -> Tensor:
        fields = _FIELDS.pack(
            _MAGIC, VERSION, self._fragment, self._payload, self._hash, turn % (1 << 32), sender
        )
        return torch.frombuffer(bytearray(fields), dtype=torch.uint8).to(self.device)


def enclosed(payload: int) -> int:
    """Bytes of a message with so many after the header."""
    return HEADER + payload + -payload % 8


class Format(Envelope):
    """How a fragment's results travel, on the device of its first chunk class.

    Args:
        method: whose.
        layout: of the fragment's parameters.
        backends: resolved backend of every chunk class.
        fragment: its number.
        plans: the chunks that are sent, where not all of the layout's are; as many as `backends`.
        part: what tells this part of the layout from others.
    """

    def __init__(
        self,
        method: Method,
        layout: Layout,
        backends: Sequence[str],
        fragment: int,
        *,
        plans: Sequence[ChunkPlan] | None = None,
        part: str = "",
    ) -> None:
        self._kind, self._backends = method.values, tuple(backends)
        plans = layout.plans if plans is None else plans
        self._sent = tuple(sent_plan(plan, method) for plan in plans)
        payload = sum(class_bytes(plan, self._kind) for plan in self._sent)
        content = described(method, layout)
        super().__init__(
            payload, (*content, part) if part else content, fragment, layout.plans[0].device
        )

    def draft(self) -> tuple[Tensor | None, list[Tensor | None]]:
        """A message to be packed, and where in it values lie as they are: `[n, k]` of every class.

        None where they do not, or not so that they can be written to.
        """
        message = torch.empty(self.size, dtype=torch.uint8, device=self.device)
        rooms: list[Tensor | None] = []
        at = HEADER
        for plan in self._sent:
            form, size = _form(plan, self._kind), class_bytes(plan, self._kind)
            room = None
            if isinstance(form, torch.dtype) and plan.k == plan.totalk and at % form.itemsize == 0:
                room = message[at : at + size].view(form).view(plan.chunks, plan.k)
            rooms.append(room)
            at += size
        return message, rooms

    def pack(
        self, turn: int, sender: int, picked: Sequence[Picked], message: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """A message, uint8 `[size]`, and what its receivers see of the values of every class.

        Args:
            turn: number of its round.
            sender: whose.
            picked: what is sent of every class.
            message: of `draft`, where values may lie already.
        """
        sealed: list[Tensor] = []
        seen = []
        for plan, p, backend in zip(self._sent, picked, self._backends, strict=True):
            parts, values = encode_class(plan, self._kind, p, backend)
            sealed += parts
            seen.append(values)
        return self.seal(turn, sender, sealed, message), seen

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
        whole = messages if len(rows) == len(messages) else messages[rows]
        picked, good = self._decode(whole)
        faults = {
            row: MALFORMED for row, is_good in zip(rows, good.tolist(), strict=True) if not is_good
        }
        if len(faults) == len(rows):
            return None, faults
        if faults:
            picked, _ = self._decode(whole[good])
        return picked, faults

    def received(self, turn: int) -> None:
        """A round's results have been received: nothing is kept of them here."""

    def state(self) -> None:
        """Nothing is kept."""

    def load(self, state: Sequence[Tensor] | None) -> None:
        """Nothing is kept."""
        assert state is None

    def _decode(self, messages: Tensor) -> tuple[list[Picked], Tensor]:
        """What well-formed rows hold, and which are: bool `[peers]`."""
        picked, at = [], HEADER
        good = torch.ones(len(messages), dtype=torch.bool, device=messages.device)
        for plan, backend in zip(self._sent, self._backends, strict=True):
            size = class_bytes(plan, self._kind)
            found, valid = decode_class(plan, self._kind, messages[:, at : at + size], backend)
            picked.append(found)
            good &= valid
            at += size
        return picked, good


def described(method: Method, layout: Layout) -> tuple[object, ...]:
    """What sender and receiver have to have alike."""
    parameters = [(p.name, p.shape, p.h, p.w, p.k, str(p.dtype)) for p in layout.parameters]
    sides = [side for p in layout.plans if p.is_transformed for side in (p.h, p.w)]
    return method.hash(), parameters, definition_hash(sides)


def sent_plan(plan: ChunkPlan, method: Method) -> ChunkPlan:
    """A class as it travels: where all replicas know the positions, they are all that there is."""
    return replace(plan, h=1, w=plan.k) if method.select == "random" else plan


def class_bytes(plan: ChunkPlan, kind: Values) -> int:
    """Bytes of a class: of the scales and the entries."""
    return wire.size(plan, _form(plan, kind)) + scale_bytes(plan, kind)


def encode_class(
    plan: ChunkPlan, kind: Values, picked: Picked, backend: str
) -> tuple[list[Tensor], Tensor]:
    """The bytes of a class, uint8 in their order, and its values as they arrive.

    The latter in the dtype in which they travel, where that is one.
    """
    form, indices, values = _form(plan, kind), picked.indices, picked.values
    if indices is None or plan.k == plan.totalk:  # not sent: all, or known to all
        indices = torch.arange(plan.k, device=plan.device).to(plan.index_dtype)
        indices = indices.expand(plan.chunks, plan.k)
    if isinstance(form, torch.dtype):
        values = values.to(form)
        entries = Entries(indices, values, unique=True)
        return [wire.pack(plan, entries, form, backend=backend)], values
    if kind == "sign":
        sent, scales, seen = values < 0, [], torch.where(values < 0, -1.0, 1.0)
        seen = seen.to(plan.compute_dtype)
    else:
        codes, seen = picked.codes, values
        if codes is None:
            codes, seen = coded(plan, kind, values, backend)
        sent, scales = codes.codes, [codes.scales.contiguous().view(-1).view(torch.uint8)]
    packed = wire.pack(plan, Entries(indices, sent, unique=True), form, backend=backend)
    return [*scales, packed], seen


def decode_class(
    plan: ChunkPlan, kind: Values, data: Tensor, backend: str
) -> tuple[Picked, Tensor]:
    """What the bytes of a class hold.

    Args:
        plan: the class.
        kind: as what values travel.
        data: uint8 `[peers, class_bytes]`.
        backend: the class's.

    Returns:
        Entries `[peers, n, k]`, and which peers' are well-formed, bool `[peers]`.
    """
    peers, at, scales, form = len(data), 0, None, _form(plan, kind)
    if isinstance(form, torch.dtype) and plan.k == plan.totalk:  # as they lie there
        values = wire.numbers(plan, data, form).view(peers, plan.chunks, plan.k)
        good = wire.are_finite(values).all(dim=1)
        return Picked(None, values.to(plan.compute_dtype)), good
    good = torch.ones(peers, dtype=torch.bool, device=data.device)

    def take(count: int) -> Tensor:
        nonlocal at
        at += count
        return data[:, at - count : at]

    if kind in BITS:
        dtype, shape = scales_of(plan, kind)
        # A copy is aligned, wherever in the message the bytes lie.
        raw = take(dtype.itemsize * math.prod(shape)).flatten().clone()
        scales = raw.view(dtype).view(peers, *shape)
        good &= scales.isfinite().flatten(1).all(1)
        if kind != "codebook4":
            good &= (scales >= 0).flatten(1).all(1)
    if scales is not None and plan.k == plan.totalk:
        values = wire.all_codes(plan, take(wire.size(plan, form)), BITS[kind])
        return Picked(None, dequantise(plan, kind, Codes(values, scales), backend)), good
    entries, valid = wire.unpack_checked(plan, take(wire.size(plan, form)), form, backend=backend)
    good &= valid.all(dim=1)
    shaped = (plan.chunks, peers, plan.k)
    values = entries.values.view(shaped).transpose(0, 1)
    if scales is not None:
        values = dequantise(plan, kind, Codes(values, scales), backend)
    elif values.dtype == torch.bool:
        values = 1 - 2 * values.to(plan.compute_dtype)
    else:
        values = values.to(plan.compute_dtype)
    known = plan.k == plan.totalk
    return Picked(None if known else entries.indices.view(shaped).transpose(0, 1), values), good


def _form(plan: ChunkPlan, kind: Values) -> wire.Values:
    """What `kernels.pack` is told of a class's values."""
    if kind == "bf16":
        return torch.bfloat16
    if kind in BITS:
        return BITS[kind]
    return plan.dtype if kind == "parameter" else "sign"


def _words(messages: Tensor) -> Tensor:
    """Messages as int64 `[peers, words]`; a copy where they are not aligned."""
    if messages.is_contiguous() and messages.data_ptr() % 8 == 0:
        return messages.view(torch.int64)
    return messages.clone(memory_format=torch.contiguous_format).view(torch.int64)
