"""Results that owners merge: what comes in does not grow with the number of replicas.

The chunks of a fragment are divided among the replicas. Each sends every owner that one's chunks of
its result; the owner merges what has come, in the order of replicas, and sends what comes out to
all, who apply the same bytes. Of R replicas each sends and gets about `2 (R - 1) / R` messages,
where with an all-gather it gets `R - 1`.

What an owner sends on, of each chunk class:

| entries | values | what |
| --- | --- | --- |
| all or at random | signs | how many are positive: exact |
| all or at random | others | the mean, coded again as the method codes |
| the largest | signs | everybody's entries in ascending order of indices: exact |
| the largest | others | all that are named, with their means, coded again (2 bits as 4) |

Values in the parameters' own type are exact too. Where the method's feedback keeps what the coding
lost ("sent"), an owner keeps that of its own coding as well: `e = decay e + mean`, of which it
sends, and takes out, what the others see of it; for entries at random nothing is kept. A message to
an owner and one of an owner have the header that `methods.message` describes, the sender of the
latter the owner; then come, a bit each, the replicas that have been merged.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from psyche_fast.distro.chunks import MAX_SLICE_ELEMENTS, Layout
from psyche_fast.kernels.plan import ChunkPlan, Member, cut_slices
from psyche_fast.kernels.quantise import Codes
from psyche_fast.methods.merged import Mean, Merged
from psyche_fast.methods.message import (
    HEADER,
    MALFORMED,
    Envelope,
    Format,
    Picked,
    class_bytes,
    described,
    enclosed,
    sent_plan,
)
from psyche_fast.methods.method import Method
from psyche_fast.methods.values import pack_bits, unpack_bits

GATHERED = 16
"""Up to so many replicas selected entries are gathered, unless owners are asked for."""

_SIGNED = {torch.uint8: torch.uint8, torch.uint16: torch.int16, torch.uint32: torch.int32}


def are_owned(method: Method, replicas: int) -> bool:
    """Whether owners merge a method's results, of so many replicas.

    That hangs on nothing else, so that all ranks of all replicas come to the same. Above `GATHERED`
    replicas selected entries go to owners where that is fewer bytes, of a chunk of full size and
    entries that no two replicas name.
    """
    if replicas < 2 or method.reduce == "gather":
        return False
    if method.reduce == "owners":
        return True
    if method.clip != "none" or method.values == "codebook4":  # of whole parameters
        return False
    if method.select == "all" or replicas <= GATHERED:
        return method.select == "all"
    n, none, chunks = method.chunk**2, torch.empty(0, 0), 1 << 10
    plan = sent_plan(
        ChunkPlan(
            h=1, w=n, k=min(method.k, n), dtype=torch.float32, compute_dtype=torch.float32,
            device=torch.device("cpu"), basis_h=none, basis_w=none, rows_h=none, rows_w=none,
            members=(Member(0, (chunks,), 0, chunks),), slices=(),
        ),
        method,
    )  # fmt: skip
    own = class_bytes(plan, method.values)
    return own + Merged.of(method, plan, replicas).bytes < replicas * own


@dataclass(frozen=True)
class _Part:
    """An owner's chunks.

    Attributes:
        classes: the numbers of the layout's classes that it has chunks of.
        chunks: their numbers in each of these, int64 `[n]`.
        merged: how they travel once they are merged.
        backends: of each.
        up: what is sent to the owner.
        down: what the owner sends.
    """

    classes: list[int]
    chunks: list[Tensor]
    merged: list[Merged]
    backends: list[str]
    up: Format
    down: Envelope


class Owners:
    """The messages of a fragment whose chunks are divided among owners; in place of a `Format`.

    A message is what goes to each owner, one after the other. What comes back are the merged
    results of all owners, one after the other.

    Args:
        method: whose.
        layout: of the fragment's parameters.
        backends: resolved backend of every chunk class.
        fragment: its number.
        replica: this one's number; the chunks of that number are its own.
        replicas: how many there are.

    Attributes:
        size: bytes of a message.
        device: where they are made.
        sizes: of it, bytes for each owner.
        merged_sizes: bytes of each owner's merged results.
    """

    def __init__(
        self,
        method: Method,
        layout: Layout,
        backends: Sequence[str],
        fragment: int,
        replica: int,
        replicas: int,
    ) -> None:
        self._method, self._layout, self.device = method, layout, layout.plans[0].device
        self._replica, self._replicas = replica, replicas
        self._mask = -(-replicas // 8)
        owned = owners_of(layout, replicas)
        self._parts = [
            self._part(number, chunks, backends, fragment) for number, chunks in enumerate(owned)
        ]
        self._places = [
            torch.cat([chunks[at] for chunks in owned]).argsort().to(plan.device)
            for at, plan in enumerate(layout.plans)
        ]
        self.sizes = [part.up.size for part in self._parts]
        self.merged_sizes = [part.down.size for part in self._parts]
        self.size = sum(self.sizes)
        own = self._parts[replica]
        self._kept: list[Tensor] | None = None
        coded = method.values not in ("sign", "parameter") and method.select != "random"
        if method.feedback == "sent" and coded:
            self._kept = [
                form.plan.basis_w.new_zeros(form.plan.chunks, form.plan.totalk)
                for form in own.merged
            ]
        self._latest = self._kept  # after what has been merged, but perhaps not been received
        self._ahead: dict[int, list[Tensor]] = {}

    def draft(self) -> tuple[Tensor | None, list[Tensor | None]]:
        """As of `Format`; values lie nowhere until they are divided."""
        return None, [None] * len(self._layout.plans)

    def pack(
        self, turn: int, sender: int, picked: Sequence[Picked], message: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """As of `Format`: a message, and what its receivers see of the values of every class."""
        assert message is None
        messages = []
        seen = [torch.empty_like(p.values) for p in picked]
        for part in self._parts:
            own = [
                _part(picked[at], rows) for at, rows in zip(part.classes, part.chunks, strict=True)
            ]
            message, values = part.up.pack(turn, sender, own)
            messages.append(message)
            for at, rows, value in zip(part.classes, part.chunks, values, strict=True):
                if picked[at].codes is None:
                    seen[at][rows] = value.to(seen[at].dtype)
        return torch.cat(messages), seen

    def check_parts(self, turn: int, parts: Tensor) -> dict[int, str]:
        """What is wrong with what replicas have sent to this owner: uint8 `[replicas, size]`."""
        up = self._parts[self._replica].up
        faults = up.faults(turn, parts)
        return faults | up.unpack(parts, faults)[1]

    def merge(self, turn: int, parts: Tensor, leave_out: Collection[int]) -> Tensor:
        """What this owner makes of what replicas have sent to it: a message to all of them.

        Rounds are merged in the order in which they are received.

        Args:
            turn: number of the round.
            parts: uint8 `[replicas, size]`, where the layout is.
            leave_out: replicas that all have agreed to refuse, those of `check_parts` among them.
        """
        part = self._parts[self._replica]
        picked, faults = part.up.unpack(parts, leave_out)
        assert not faults, faults
        merged = [r not in leave_out for r in range(self._replicas)]
        mask = pack_bits(torch.tensor(merged, dtype=torch.uint8, device=parts.device), 1)
        sealed, kept = [mask], self._latest
        if picked is not None:
            if kept is not None:
                kept = [e * self._method.decay for e in kept]
            for at, (form, backend, p) in enumerate(
                zip(part.merged, part.backends, picked, strict=True)
            ):
                mean = Mean(self._method, form, None if kept is None else kept[at])
                encoded = form.encode(p, mean, backend)
                sealed += encoded.parts
                if encoded.seen is not None:
                    mean.take_out(encoded.seen, encoded.indices)
        if kept is not None:
            self._latest = self._ahead[turn] = kept
        return part.down.seal(turn, self._replica, sealed)

    def split(self, merged: Tensor) -> tuple[Tensor, ...]:
        """Each owner's part of what they have sent.

        Args:
            merged: all owners', uint8 `[sum(merged_sizes)]`.

        Raises:
            ValueError: `merged` of another shape or dtype.
        """
        if merged.dtype != torch.uint8 or merged.shape != (sum(self.merged_sizes),):
            raise ValueError(
                f"messages: wanted the owners', uint8 [{sum(self.merged_sizes)}], got "
                f"{merged.dtype} {list(merged.shape)}"
            )
        return merged.split(self.merged_sizes)

    def faults(
        self, turn: int, merged: Tensor, left_out: Collection[int] | None = None
    ) -> dict[int, str]:
        """What is wrong with the header, the checksum or the senders of owners' results, by owner.

        Args:
            turn: number of the round.
            merged: all owners', uint8 `[sum(merged_sizes)]`.
            left_out: the replicas that all have agreed to leave out; None to take their word.

        Raises:
            ValueError: `merged` of another shape or dtype.
        """
        faults = {}
        for owner, row in enumerate(self.split(merged)):
            down = self._parts[owner].down
            for why in down.faults(turn, row[None], [owner]).values():
                faults[owner] = f"what it has merged: {why}"
            senders = self._senders(row)
            if left_out is not None and owner not in faults:
                wanted = [r for r in range(self._replicas) if r not in left_out]
                if senders != wanted:
                    faults[owner] = f"it has merged replicas {senders}, wanted {wanted}"
        return faults

    def unpack(
        self, merged: Tensor, leave_out: Collection[int] = ()
    ) -> tuple[list[Picked] | None, dict[int, str]]:
        """What owners' results hold in which `faults` sees none.

        Args:
            merged: all owners', uint8 `[sum(merged_sizes)]`, on the layout's device.
            leave_out: owners whose results all have agreed to refuse.

        Returns:
            One `Picked` per chunk class, of replicas whose mean is that of those who were merged.
            None where an owner's results are refused, of which none are applied then, or where
            nobody was merged. And what is wrong, by replica, those included that owners left out.
        """
        if leave_out:
            return None, {}
        senders, picked, faults = self._decode(self.split(merged))
        missing = {
            r: "owners have left its result out"
            for r in range(self._replicas)
            if r not in senders and r not in faults
        }
        return None if faults else picked, faults | missing

    def malformed(self, merged: Tensor, leave_out: Collection[int]) -> dict[int, str]:
        """What is wrong with owners' results beyond what `faults` sees, of which nothing may be."""
        return {} if leave_out else self._decode(self.split(merged))[2]

    def _decode(
        self, rows: Sequence[Tensor]
    ) -> tuple[list[int], list[Picked] | None, dict[int, str]]:
        """Who has been merged, what that is, and which owners' results cannot be right."""
        senders = self._senders(rows[0])
        faults = {
            owner: "it has merged others than the rest have"
            for owner, row in enumerate(rows)
            if self._senders(row) != senders
        }
        if faults or not senders:
            return senders, None, faults
        found: list[list[Picked]] = [[] for _ in self._layout.plans]
        for owner, row in enumerate(rows):
            part, at = self._parts[owner], HEADER + self._mask
            for place, form, backend in zip(part.classes, part.merged, part.backends, strict=True):
                picked, is_good = form.decode(row[at : at + form.bytes], len(senders), backend)
                found[place].append(picked)
                at += form.bytes
                if not is_good:
                    faults[owner] = f"what it has merged: {MALFORMED}"
        sent = [sent_plan(plan, self._method) for plan in self._layout.plans]
        whole = [
            _joined(p, places, plan)
            for p, places, plan in zip(found, self._places, sent, strict=True)
        ]
        return senders, whole, faults

    def received(self, turn: int) -> None:
        """A round's results have been received, and are not going to be merged again."""
        self._kept = self._ahead.pop(turn, self._kept)

    def state(self) -> list[Tensor] | None:
        """What this owner's coding has kept of what was received, as `[n, h w]` of every class.

        Zero for others' chunks; None where nothing is kept. Messages in flight are merged again.
        """
        if self._kept is None:
            return None
        part, whole = self._parts[self._replica], []
        for plan in self._layout.plans:
            whole.append(plan.basis_w.new_zeros(plan.chunks, plan.totalk))
        for at, rows, kept in zip(part.classes, part.chunks, self._kept, strict=True):
            whole[at][rows] = kept
        return whole

    def load(self, state: Sequence[Tensor] | None) -> None:
        """Take up what `state` gave; None for nothing kept."""
        self._ahead = {}
        if self._kept is not None:
            part = self._parts[self._replica]
            self._kept = [
                torch.zeros_like(kept) if state is None else state[at].to(kept.device)[rows]
                for at, rows, kept in zip(part.classes, part.chunks, self._kept, strict=True)
            ]
        self._latest = self._kept

    def _part(
        self, number: int, owned: Sequence[Tensor], backends: Sequence[str], fragment: int
    ) -> _Part:
        plans = self._layout.plans
        classes = [at for at, chunks in enumerate(owned) if len(chunks)]
        cut = [_cut(plans[at], len(owned[at])) for at in classes]
        own = [backends[at] for at in classes]
        merged = [
            Merged.of(self._method, sent_plan(plan, self._method), self._replicas) for plan in cut
        ]
        name = f"owner {number} of {self._replicas}"
        up = Format(self._method, self._layout, own, fragment, plans=cut, part=name)
        content = (*described(self._method, self._layout), name, "merged")
        payload = self._mask + sum(form.bytes for form in merged)
        down = Envelope(payload, content, fragment, plans[0].device)
        chunks = [owned[at].to(plans[at].device) for at in classes]
        return _Part(classes, chunks, merged, own, up, down)

    def _senders(self, row: Tensor) -> list[int]:
        """The replicas that an owner has merged."""
        bits = unpack_bits(row[None, HEADER : HEADER + self._mask], 1, (self._replicas,))[0]
        return bits.nonzero().view(-1).tolist()


def owners_of(layout: Layout, replicas: int) -> list[list[Tensor]]:
    """By owner and class the numbers of the owner's chunks, int64 `[n]` in host memory.

    The owners of a parameter's chunks take turns, and the first is another one for each parameter.
    """
    owned: list[list[Tensor]] = [[] for _ in range(replicas)]
    for plan in layout.plans:
        turns = [torch.arange(m.count) + _first(layout, m, replicas) for m in plan.members]
        owner = torch.cat(turns) % replicas
        for number, own in enumerate(owned):
            own.append((owner == number).nonzero().view(-1))
    return owned


def sizes_of(method: Method, layout: Layout, replicas: int) -> tuple[list[int], list[int]]:
    """`sizes` and `merged_sizes` of `Owners`, of any layout, without work on its chunks."""
    sizes, merged = [], []
    for owner in range(replicas):
        own = 0
        out = -(-replicas // 8)
        for plan in layout.plans:
            firsts = [(m.count, _first(layout, m, replicas)) for m in plan.members]
            # Of `count` chunks in turn from owner `first` on.
            chunks = sum((n - 1 - (owner - at) % replicas) // replicas + 1 for n, at in firsts)
            if chunks:
                sent = sent_plan(_cut(plan, chunks), method)
                own += class_bytes(sent, method.values)
                out += Merged.of(method, sent, replicas).bytes
        sizes.append(enclosed(own))
        merged.append(enclosed(out))
    return sizes, merged


def _first(layout: Layout, member: Member, replicas: int) -> int:
    """Whose a parameter's first chunk is."""
    return zlib.crc32(layout.parameters[member.position].name.encode()) % replicas


def _cut(plan: ChunkPlan, chunks: int) -> ChunkPlan:
    """So many chunks of a class."""
    members = (Member(0, (chunks,), 0, chunks),)
    return replace(
        plan, members=members, slices=cut_slices(members, plan.totalk, MAX_SLICE_ELEMENTS)
    )


def _part(picked: Picked, rows: Tensor) -> Picked:
    """Some chunks' entries, to be sent."""
    if picked.codes is not None:
        codes = Codes(picked.codes.codes[rows], picked.codes.scales[rows])
        return Picked(None, picked.values, codes)
    return Picked(_rows(picked.indices, rows), picked.values[rows])


def _rows(tensor: Tensor | None, rows: Tensor) -> Tensor | None:
    """Rows of indices, which have few operations in their own dtype."""
    if tensor is None:
        return None
    return tensor.view(_SIGNED.get(tensor.dtype, tensor.dtype))[rows].view(tensor.dtype)


def _joined(parts: Sequence[Picked], places: Tensor, plan: ChunkPlan) -> Picked:
    """The owners' parts of a class `[replicas, n, k]` as one, its chunks in their order."""
    if not parts:  # no chunks, no owners
        values = plan.basis_w.new_zeros(1, 0, plan.k)
        known = plan.k == plan.totalk
        return Picked(None if known else values.to(plan.index_dtype), values)
    values = torch.cat([p.values for p in parts], 1).index_select(1, places)
    if parts[0].indices is None:
        return Picked(None, values)
    indices = [p.indices for p in parts if p.indices is not None]
    signed = _SIGNED[indices[0].dtype]
    joined = torch.cat([i.view(signed) for i in indices], 1).index_select(1, places)
    return Picked(joined.view(indices[0].dtype), values)
