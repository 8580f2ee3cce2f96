"""What a peer sends of a step: one message of fixed size, that says what it is and is checked.

A header of 40 bytes, little-endian, and then the packed entries of every chunk class, one after the
other (`psyche_fast.kernels.pack`), and zeros up to a multiple of 8 bytes:

| bytes | what |
| --- | --- |
| 0 to 3 | `PFDR` |
| 4, 5 | version of this format, 2 |
| 6 | values: 0 signs, else bits of a value's dtype: 16 bfloat16, 17 float16, 32, 64 |
| 7 | 0 |
| 8 to 15 | bytes after the header |
| 16 to 23 | hash of the layout: names, shapes, chunks, k and dtypes |
| 24 to 31 | hash of the definition of directions (`psyche_fast.integers`) |
| 32 to 39 | checksum of the bytes after the header, as `hash_bits` gives it of int64 words |
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from psyche_fast.distro.chunks import Layout
from psyche_fast.integers import definition_hash
from psyche_fast.kernels import pack as wire
from psyche_fast.kernels.plan import Entries

VERSION = 2
_MAGIC = b"PFDR"
_FIELDS = struct.Struct("<4sHBxQQQ")  # all but the checksum
_HEADER = _FIELDS.size + 8
_VALUES = {torch.bfloat16: 16, torch.float16: 17, torch.float32: 32, torch.float64: 64}

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Odd as every word's weight, so invertible modulo 2^64: a change of one word changes the hash.
_MULTIPLIER = -7046029254386353131
# On a CPU the slice and its weights stay in the cache; on a GPU a launch should be worth it.
_SLICE = {"cpu": 1 << 16, "cuda": 1 << 24}


class MessageFormat:
    """How the results of a layout travel: on the device of its first chunk class.

    Args:
        layout: whose results; equal on all peers.
        backends: resolved backend of every chunk class.
        signs: send only the values' signs.

    Attributes:
        size: bytes of a message.
    """

    def __init__(self, layout: Layout, backends: Sequence[str], *, signs: bool) -> None:
        self._plans, self._backends = layout.plans, tuple(backends)
        self._values: list[wire.Values] = ["sign" if signs else p.dtype for p in self._plans]
        self._sizes = [wire.size(p, v) for p, v in zip(self._plans, self._values, strict=True)]
        payload = sum(self._sizes)
        payload += -payload % 8
        self.size = _HEADER + payload
        described = repr(
            [(p.name, p.shape, p.h, p.w, p.k, str(p.dtype)) for p in layout.parameters]
        )
        digest = hashlib.blake2b(described.encode(), digest_size=8).digest()
        code = 0 if signs else max((_VALUES[p.dtype] for p in self._plans), default=0)
        definition = definition_hash(side for p in self._plans for side in (p.h, p.w))
        fields = _FIELDS.pack(
            _MAGIC, VERSION, code, payload, int.from_bytes(digest, "little"), definition
        )
        device = self._plans[0].device
        self._fields = torch.frombuffer(bytearray(fields), dtype=torch.uint8).to(device)

    def pack(self, entries: Sequence[Entries]) -> Tensor:
        """A message of one rank's entries, uint8 `[size]`; the device is not waited for."""
        message = torch.zeros(self.size, dtype=torch.uint8, device=self._fields.device)
        message[: _FIELDS.size] = self._fields
        at = _HEADER
        for plan, e, values, size, backend in zip(
            self._plans, entries, self._values, self._sizes, self._backends, strict=True
        ):
            part = message[at : at + size]
            if e.indices.device == message.device:
                wire.pack(plan, e, values, out=part, backend=backend)
            else:
                part.copy_(wire.pack(plan, e, values, backend=backend))
            at += size
        words = message.view(torch.int64)
        words[_HEADER // 8 - 1] = hash_rows(words[None, _HEADER // 8 :])[0]
        return message

    def faults(self, messages: Tensor) -> dict[int, str]:
        """What is wrong with the header or the checksum of messages; waits for their device.

        That is all that damage on the way can do to a message. Messages without such faults are the
        same bytes wherever they have arrived, and so is what unpacking finds in them.

        Args:
            messages: uint8 `[peers, size]`, contiguous; from anybody.

        Returns:
            For each bad row what is wrong with it.

        Raises:
            ValueError: messages of another shape or dtype.
        """
        self._check_form(messages)
        words = messages.view(torch.int64)
        fields = self._fields.to(messages.device)
        checks = torch.stack(
            [
                (messages[:, : _FIELDS.size] == fields).all(dim=1),
                hash_rows(words[:, _HEADER // 8 :]) == words[:, _HEADER // 8 - 1],
            ]
        )
        faults = {}
        for row, (header, checksum) in enumerate(checks.t().tolist()):
            if not header:
                faults[row] = self._what_differs(bytes(messages[row, : _FIELDS.size].tolist()))
            elif not checksum:
                faults[row] = "its checksum does not match its content"
        return faults

    def unpack(self, messages: Tensor) -> tuple[list[Entries] | None, dict[int, str]]:
        """Check messages and decode the good ones, for those who agree with nobody on them.

        Args:
            messages: uint8 `[peers, size]`, contiguous, on the layout's device; from anybody.

        Returns:
            As `Unpacking.result`.

        Raises:
            ValueError: messages of another shape or dtype.
        """
        damaged = self.faults(messages)
        entries, malformed = self.begin_unpack(messages, leave_out=damaged).result()
        return entries, damaged | malformed

    def begin_unpack(self, messages: Tensor, *, leave_out: Collection[int] = ()) -> Unpacking:
        """Begin to decode messages in which `faults` sees none; waits for nothing.

        Args:
            messages: uint8 `[peers, size]`, contiguous, on the layout's device.
            leave_out: rows that are not to be looked at.

        Raises:
            ValueError: messages of another shape or dtype.
        """
        self._check_form(messages)
        rows = [row for row in range(len(messages)) if row not in leave_out]
        if len(rows) < len(messages):
            messages = messages[rows]
        entries, well_formed = self._decode(messages)
        copied = None
        checks = well_formed.to("cpu", non_blocking=True)  # from a GPU into pinned memory
        if messages.is_cuda:
            copied = torch.cuda.current_stream(messages.device).record_event()
        return Unpacking(self, messages, rows, entries, checks, copied)

    def _check_form(self, messages: Tensor) -> None:
        if messages.dtype != torch.uint8 or messages.dim() != 2 or messages.shape[1] != self.size:
            raise ValueError(
                f"messages: wanted uint8 [peers, {self.size}], got {messages.dtype} "
                f"{list(messages.shape)}"
            )

    def _decode(self, messages: Tensor) -> tuple[list[Entries], Tensor]:
        """Entries by chunk class, and bool `[peers]`: whether all chunks are well-formed."""
        entries, at = [], _HEADER
        good = torch.ones(len(messages), dtype=torch.bool, device=messages.device)
        for plan, values, size, backend in zip(
            self._plans, self._values, self._sizes, self._backends, strict=True
        ):
            rows = messages[:, at : at + size].to(plan.device)
            decoded, valid = wire.unpack_checked(plan, rows, values, backend=backend)
            entries.append(decoded)
            good &= valid.all(dim=1).to(good.device)
            at += size
        return entries, good

    def _what_differs(self, header: bytes) -> str:
        wanted = _FIELDS.unpack(bytes(self._fields.tolist()))
        names = ("magic", "version", "kind of values", "size", "layout hash", "definition hash")
        for name, mine, theirs in zip(names, wanted, _FIELDS.unpack(header), strict=True):
            if mine != theirs:
                return f"its header has the {name} {theirs!r}, wanted {mine!r}"
        return "its header has bytes set that should be 0"


@dataclass(frozen=True, slots=True)
class Unpacking:
    """Messages that are being decoded and checked on their device.

    `result` is to be called on the stream on which it was begun.
    """

    _format: MessageFormat
    _messages: Tensor
    _rows: list[int]
    _entries: list[Entries]
    _well_formed: Tensor  # bool [peers] in host memory, valid once `_copied` is past
    _copied: torch.cuda.Event | None

    def result(self) -> tuple[list[Entries] | None, dict[int, str]]:
        """What the messages hold; the host waits until they are checked, and for nothing since.

        Returns:
            The entries of the good ones side by side, in the order of the rows, one `Entries` per
            chunk class; None where there is no good one. And for each bad row what is wrong with
            it.
        """
        if self._copied is not None:
            self._copied.synchronize()
        formed = self._well_formed.tolist()
        faults = {
            row: "an index is out of order or range, or a value is not finite"
            for row, good in zip(self._rows, formed, strict=True)
            if not good
        }
        if len(faults) == len(self._rows):
            return None, faults
        if not faults:
            return self._entries, faults
        return self._format._decode(self._messages[self._well_formed])[0], faults


def hash_bits(tensor: Tensor) -> Tensor:
    """A position-dependent hash of a tensor's bits: int64, 0-d, on its device.

    Integer arithmetic modulo 2^64: the same on every device and in any order of additions.
    """
    words = tensor.detach().contiguous().view(-1).view(_WORDS[tensor.element_size()])
    return hash_rows(words.unsqueeze(0))[0]


def hash_rows(words: Tensor) -> Tensor:
    """`hash_bits` of each row: int64 `[n]` of integers `[n, words]`."""
    weights = _odd_numbers(words.device)
    total = torch.zeros(len(words), dtype=torch.int64, device=words.device)
    for at, part in enumerate(words.split(weights.numel(), dim=1)):
        total += (part * weights[: part.shape[1]]).sum(dim=1)
        total += part.sum(dim=1) * (2 * at * weights.numel())
    return total * _MULTIPLIER


@cache
def _odd_numbers(device: torch.device) -> Tensor:
    return torch.arange(1, 2 * _SLICE[device.type], 2, dtype=torch.int64, device=device)
