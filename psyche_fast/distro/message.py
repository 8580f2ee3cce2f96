"""What a peer sends of a step: one message of fixed size, that says what it is and is checked.

A header of 40 bytes, little-endian, and then the packed entries of every chunk class, one after the
other (`psyche_fast.kernels.pack`), and zeros up to a multiple of 8 bytes:

| bytes | what |
| --- | --- |
| 0 to 3 | `PFDR` |
| 4, 5 | version of this format, 1 |
| 6 | values: 0 signs, else bits of a value's dtype: 16 bfloat16, 17 float16, 32, 64 |
| 7 | 0 |
| 8 to 15 | bytes after the header |
| 16 to 23 | hash of the layout: names, shapes, chunks, k and dtypes |
| 24 to 31 | 0 |
| 32 to 39 | checksum of the bytes after the header, as `hash_bits` gives it of int64 words |
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from psyche_fast.distro.chunks import Layout
from psyche_fast.distro.replicas import hash_rows
from psyche_fast.kernels import pack as wire
from psyche_fast.kernels.plan import Entries

VERSION = 1
_MAGIC = b"PFDR"
_FIELDS = struct.Struct("<4sHBxQQ8x")  # all but the checksum
_HEADER = _FIELDS.size + 8
_VALUES = {torch.bfloat16: 16, torch.float16: 17, torch.float32: 32, torch.float64: 64}


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
        fields = _FIELDS.pack(_MAGIC, VERSION, code, payload, int.from_bytes(digest, "little"))
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

    def unpack(self, messages: Tensor) -> tuple[list[Entries] | None, dict[int, str]]:
        """Check messages and decode those that hold what they should.

        All are checked before anything is made of them, with one wait for the device.

        Args:
            messages: uint8 `[peers, size]`, contiguous; from anybody.

        Returns:
            What `Unpacking.result` gives.

        Raises:
            ValueError: messages of another shape or dtype.
        """
        return self.begin_unpack(messages).result()

    def begin_unpack(self, messages: Tensor) -> Unpacking:
        """`unpack` in two parts: this one waits for nothing, `Unpacking.result` for what it gave.

        Raises:
            ValueError: messages of another shape or dtype.
        """
        if messages.dtype != torch.uint8 or messages.dim() != 2 or messages.shape[1] != self.size:
            raise ValueError(
                f"messages: wanted uint8 [peers, {self.size}], got {messages.dtype} "
                f"{list(messages.shape)}"
            )
        entries, well_formed = self._decode(messages)
        words = messages.view(torch.int64)
        checks = torch.stack(
            [
                (messages[:, : _FIELDS.size] == self._fields).all(dim=1),
                hash_rows(words[:, _HEADER // 8 :]) == words[:, _HEADER // 8 - 1],
                well_formed,
            ]
        ).to("cpu", non_blocking=True)  # from a GPU into pinned memory, behind the decoding
        copied = None
        if messages.is_cuda:
            copied = torch.cuda.current_stream(messages.device).record_event()
        return Unpacking(self, messages, entries, checks, copied)

    def _decode(self, messages: Tensor) -> tuple[list[Entries], Tensor]:
        """Entries by chunk class, and bool `[peers]`: whether all chunks are well-formed."""
        entries, at = [], _HEADER
        good = torch.ones(len(messages), dtype=torch.bool, device=messages.device)
        for plan, values, size, backend in zip(
            self._plans, self._values, self._sizes, self._backends, strict=True
        ):
            rows = messages[:, at : at + size].to(plan.device)
            found, valid = wire.unpack_checked(plan, rows, values, backend=backend)
            entries.append(found)
            good &= valid.all(dim=1).to(good.device)
            at += size
        return entries, good

    def _what_differs(self, header: bytes) -> str:
        wanted = _FIELDS.unpack(bytes(self._fields.tolist()))
        names = ("magic", "version", "kind of values", "size", "layout hash")
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
    _entries: list[Entries]
    _checks: Tensor  # bool [3, peers] in host memory, there once `_copied` is past
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
        faults = {}
        for row, (header, checksum, formed) in enumerate(zip(*self._checks.tolist(), strict=True)):
            if not header:
                fields = bytes(self._messages[row, : _FIELDS.size].tolist())
                faults[row] = self._format._what_differs(fields)
            elif not checksum:
                faults[row] = "its checksum does not match its content"
            elif not formed:
                faults[row] = "an index is out of order or range, or a value is not finite"
        if not faults:
            return self._entries, faults
        good = [row for row in range(len(self._messages)) if row not in faults]
        if not good:
            return None, faults
        return self._format._decode(self._messages[good])[0], faults
