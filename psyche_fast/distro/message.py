"""What a peer sends of a step: one message of fixed size, that says what it is and is checked.

A header of 56 bytes, little-endian, and then the packed entries of every chunk class, one after the
other (`psyche_fast.kernels.pack`), and zeros up to a multiple of 8 bytes:

| bytes | what |
| --- | --- |
| 0 to 3 | `PFDR` |
| 4, 5 | version of this format, 3 |
| 6 | values: 0 signs, else bits of a value's dtype: 16 bfloat16, 17 float16, 32, 64 |
| 7 | 0 |
| 8 to 15 | bytes after the header |
| 16 to 23 | hash of the layout: names, shapes, chunks, k and dtypes |
| 24 to 31 | hash of the definition of directions (`psyche_fast.integers`) |
| 32 to 39 | number of the exchange |
| 40 to 47 | sender: its replica |
| 48 to 55 | checksum of the bytes after the header, as `hash_bits` gives it of int64 words |
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from psyche_fast.distro.chunks import Layout
from psyche_fast.integers import definition_hash
from psyche_fast.kernels import pack as wire
from psyche_fast.kernels.plan import Entries

VERSION = 3
_MAGIC = b"PFDR"
_FIELDS = struct.Struct("<4sHBxQQQ")  # those that all messages of a run have alike
_NUMBER, _SENDER, _CHECKSUM = (_FIELDS.size // 8 + at for at in range(3))  # words
_HEADER = _FIELDS.size + 24
_VALUES = {torch.bfloat16: 16, torch.float16: 17, torch.float32: 32, torch.float64: 64}

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Odd as every word's weight, so invertible modulo 2^64: a change of one word changes the hash.
_MULTIPLIER = -7046029254386353131
_NARROWEST = 0.05
"""The least that norms are taken to differ by, a factor's logarithm: equal ones are no reason."""
_COLUMNS = 1 << 12
"""Of the rectangle whose sums are the hash of what lies in it."""


class MessageFormat:
    """How the results of a layout travel: on the device of its first chunk class.

    Args:
        layout: whose results; equal on all peers.
        backends: resolved backend of every chunk class.
        signs: send only the values' signs.
        outliers: refuse messages whose norm is larger than the others' by so many robust standard
            deviations; None for any norm. Signs have all the same.

    Attributes:
        size: bytes of a message.
    """

    def __init__(
        self,
        layout: Layout,
        backends: Sequence[str],
        *,
        signs: bool,
        outliers: float | None = None,
    ) -> None:
        assert not (signs and outliers is not None)
        self._outliers = outliers
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

    def pack(self, entries: Sequence[Entries], number: int = 0, sender: int = 0) -> Tensor:
        """A message of one rank's entries, uint8 `[size]`; the device is not waited for.

        Args:
            entries: one `Entries` per chunk class.
            number: of the exchange.
            sender: whose they are.
        """
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
        words[_NUMBER].fill_(number)
        words[_SENDER].fill_(sender)
        words[_CHECKSUM] = hash_rows(words[None, _HEADER // 8 :])[0]
        return message

    def faults(
        self, messages: Tensor, number: int = 0, senders: Sequence[int] | None = None
    ) -> dict[int, str]:
        """What is wrong with the header or the checksum of messages; waits for their device.

        That is all that damage on the way can do to a message.

        Args:
            messages: uint8 `[peers, size]`, contiguous; from anybody.
            number: of the exchange; another one's messages are an earlier step's, sent again.
            senders: whose messages the rows have to be; None for nobody in particular (0).

        Returns:
            For each bad row what is wrong with it.

        Raises:
            ValueError: messages of another shape or dtype.
        """
        self._check_form(messages)
        words = messages.view(torch.int64)
        fields = self._fields.to(messages.device)
        wanted = [0] * len(messages) if senders is None else list(senders)
        checks = torch.stack(
            [
                (messages[:, : _FIELDS.size] == fields).all(dim=1),
                words[:, _NUMBER] == number,
                words[:, _SENDER] == torch.tensor(wanted, device=messages.device),
                hash_rows(words[:, _HEADER // 8 :]) == words[:, _CHECKSUM],
            ]
        )
        faults = {}
        for row, (header, timely, own, checksum) in enumerate(checks.t().tolist()):
            if not header:
                faults[row] = self._what_differs(bytes(messages[row, : _FIELDS.size].tolist()))
            elif not timely:
                faults[row] = f"it is of exchange {int(words[row, _NUMBER])}, wanted {number}"
            elif not own:
                faults[row] = f"it is replica {int(words[row, _SENDER])}'s, not its own"
            elif not checksum:
                faults[row] = "its checksum does not match its content"
        return faults

    def decode(
        self, messages: Tensor, leave_out: Collection[int]
    ) -> tuple[Unpacking | None, dict[int, str]]:
        """What is wrong with the content of messages in which `faults` sees nothing.

        Messages that are the same bytes everywhere have the same content everywhere.

        Args:
            messages: uint8 `[peers, size]`, contiguous, in host memory.
            leave_out: rows that are not to be looked at.

        Returns:
            Where results are decoded on the host: what has been decoded; None elsewhere, where that
            is the device's work. And for each bad row what is wrong with it.
        """
        rows = [row for row in range(len(messages)) if row not in leave_out]
        # Beside what the main thread does: Triton's interpreter has one state for both.
        if all(backend == "torch" for backend in self._backends) and not self._fields.is_cuda:
            unpacking = self.begin_unpack(messages, leave_out=leave_out)
            formed = unpacking.well_formed
        else:
            unpacking, formed = None, self._well_formed(messages[rows]).tolist()
        pairs = zip(rows, formed, strict=True)
        faults = {row: _MALFORMED for row, good in pairs if not good}
        left = [row for row in rows if row not in faults]
        if self._outliers is not None:
            norms = self._norms(messages[left])
            faults |= {left[at]: why for at, why in find_outliers(norms, self._outliers).items()}
        return unpacking, faults

    def _well_formed(self, messages: Tensor) -> Tensor:
        good, at = torch.ones(len(messages), dtype=torch.bool), _HEADER
        for plan, values, size in zip(self._plans, self._values, self._sizes, strict=True):
            good &= wire.well_formed(plan, messages[:, at : at + size], values)
            at += size
        return good

    def _norms(self, messages: Tensor) -> np.ndarray:
        """Of the values of each message, float64 `[peers]`."""
        squares, at = np.zeros(len(messages)), _HEADER
        for plan, values, size in zip(self._plans, self._values, self._sizes, strict=True):
            squares += wire.squares(plan, messages[:, at : at + size], values).numpy()
            at += size
        return np.sqrt(squares)

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

    @property
    def well_formed(self) -> list[bool]:
        """Of the rows that were not left out; the host waits until they are checked."""
        if self._copied is not None:
            self._copied.synchronize()
        formed: list[bool] = self._well_formed.tolist()
        return formed

    @property
    def rows(self) -> list[int]:
        """The rows that were not left out."""
        return self._rows

    def result(self) -> tuple[list[Entries] | None, dict[int, str]]:
        """What the messages hold; the host waits until they are checked, and for nothing since.

        Returns:
            The entries of the good ones side by side, in the order of the rows, one `Entries` per
            chunk class; None where there is no good one. And for each bad row what is wrong with
            it.
        """
        pairs = zip(self._rows, self.well_formed, strict=True)
        faults = {row: _MALFORMED for row, good in pairs if not good}
        if len(faults) == len(self._rows):
            return None, faults
        if not faults:
            return self._entries, faults
        return self._format._decode(self._messages[self._well_formed])[0], faults


_MALFORMED = "an index is out of order or range, or a value is not finite"


def find_outliers(norms: np.ndarray, limit: float) -> Mapping[int, str]:
    """Which norms are larger than the others' by more than `limit` robust standard deviations.

    Of the logarithms, from their median, in units of 1.4826 times the median distance from it: what
    fewer than half of the peers say moves neither. Of fewer than three nobody can tell.
    """
    if len(norms) < 3:
        return {}
    logs = np.log(np.maximum(norms, np.finfo(np.float64).tiny))
    median = np.median(logs)
    spread = max(1.4826 * float(np.median(np.abs(logs - median))), _NARROWEST)
    return {
        at: f"its norm {norms[at]:.3g} is {math.exp(log - median):.3g} times the others' median"
        for at, log in enumerate(logs)
        if log - median > limit * spread
    }


def hash_bits(tensor: Tensor) -> Tensor:
    """A position-dependent hash of a tensor's bits: int64, 0-d, on its device.

    Integer arithmetic modulo 2^64: the same on every device and in any order of additions.
    """
    words = tensor.detach().contiguous().view(-1).view(_WORDS[tensor.element_size()])
    return hash_rows(words.unsqueeze(0))[0]


def hash_rows(words: Tensor) -> Tensor:
    """`hash_bits` of each row: int64 `[n]` of integers `[n, words]`.

    Word `i` has the weight `2 i + 1`. Sums of rows and columns of a rectangle say what a product of
    each with its weight would, which took a pass to write.
    """
    rows = words.shape[1] // _COLUMNS
    body, rest = words.tensor_split([rows * _COLUMNS], dim=1)
    total = (rest * _odd_numbers(rest.shape[1], 2 * rows * _COLUMNS, words.device)).sum(1)
    if rows:
        body = body.unflatten(1, (rows, _COLUMNS))
        total += (body.sum(2) * _odd_numbers(rows, 0, words.device, _COLUMNS)).sum(1)
        total += (body.sum(1) * (_odd_numbers(_COLUMNS, 0, words.device) - 1)).sum(1)
    return total * _MULTIPLIER


def _odd_numbers(count: int, first: int, device: torch.device, step: int = 1) -> Tensor:
    """From `first + 1` on, each larger than the one before by `2 step`."""
    numbers = torch.arange(count, dtype=torch.int64, device=device)
    return numbers.mul_(2 * step).add_(first + 1)
