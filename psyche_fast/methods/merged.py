"""How an owner's merged results of a chunk class are made, and travel; see `owners.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from psyche_fast.kernels import pack as wire
from psyche_fast.kernels.plan import ChunkPlan, Entries
from psyche_fast.methods.message import Picked, class_bytes, decode_class, encode_class
from psyche_fast.methods.method import Method, Values
from psyche_fast.methods.values import pack_bits, unpack_bits


@dataclass(frozen=True)
class Merged:
    """How the merged results of a class travel.

    Attributes:
        plan: the class, as it is sent to its owner.
        replicas: how many there are at most.
        sent: the class as `encode_class` takes it; None for signs.
        kind: as what values travel.
    """

    plan: ChunkPlan
    replicas: int
    sent: ChunkPlan | None
    kind: Values

    @staticmethod
    def of(method: Method, plan: ChunkPlan, replicas: int) -> Merged:
        """Of a class, or an owner's part of one, as it is sent to its owner."""
        if method.values == "sign":
            return Merged(plan, replicas, None, "sign")
        slots = min(replicas * plan.k, plan.totalk)
        # What fills up is zero, which two bits have no code for.
        coarse = method.select == "topk" and method.values == "2bit"
        kind: Values = "4bit" if coarse else method.values
        return Merged(plan, replicas, replace(plan, h=1, w=plan.totalk, k=slots), kind)

    @property
    def is_known(self) -> bool:
        """Whether all replicas know the positions."""
        return self.plan.k == self.plan.totalk

    @cached_property
    def bytes(self) -> int:
        """Of all that there may be."""
        if self.sent is not None:
            return class_bytes(self.sent, self.kind)
        if self.is_known:
            return sum(self._planes()) * (-(-self.plan.chunks * self.plan.k // 8))
        return wire.size(self._dealt(self.replicas), "sign")

    def encode(self, picked: Picked, mean: Callable[[Picked], Picked], backend: str) -> Encoded:
        """What is sent of entries `[replicas, n, k]`, of which `mean` makes `sent`'s."""
        if self.sent is not None:
            merged = mean(picked)
            return Encoded(*encode_class(self.sent, self.kind, merged, backend), merged.indices)
        if self.is_known:
            count, parts = (picked.values > 0).sum(0, dtype=torch.int32), []
            for low, planes in enumerate(self._planes()):
                if planes:
                    parts.append(pack_bits((count >> (8 * low)) & 255, planes))
            return Encoded(parts, None, None)
        assert picked.indices is not None
        replicas, n, k = picked.values.shape
        keys = picked.indices.to(torch.int64) * 2 + (picked.values < 0)
        keys = keys.transpose(0, 1).reshape(n, replicas * k).sort(1).values
        plan = self._dealt(replicas)
        places = (keys >> 1) + torch.arange(plan.k, device=keys.device)  # no two are the same now
        entries = Entries(places.to(plan.index_dtype), (keys & 1).bool(), unique=True)
        packed = wire.pack(plan, entries, "sign", backend=backend)
        rest = packed.new_zeros(self.bytes - len(packed))  # of replicas that are refused
        return Encoded([packed, rest], None, None)

    def decode(self, data: Tensor, merged: int, backend: str) -> tuple[Picked, bool]:
        """What bytes `[bytes]` hold of so many replicas, and whether that can be.

        Signs are dealt out to as many replicas as were merged: `[merged, n, k]`, whose sums are
        those of the real ones. Of all else `[1, n, slots]`.
        """
        if self.sent is not None:
            found, good = decode_class(self.sent, self.kind, data[None], backend)
            return found, bool(good)
        plan, rows = self.plan, torch.arange(merged, device=data.device)
        if self.is_known:
            count = torch.zeros(plan.chunks, plan.k, dtype=torch.int32, device=data.device)
            at = 0
            for low, planes in enumerate(self._planes()):
                size = planes * (-(-plan.chunks * plan.k // 8))
                if planes:
                    part = unpack_bits(data[None, at : at + size], planes, count.shape)[0]
                    count += part.to(torch.int32) << (8 * low)
                at += size
            values = torch.where(rows.view(-1, 1, 1) < count, 1.0, -1.0)
            return Picked(None, values.to(plan.compute_dtype)), bool((count <= merged).all())
        sent = self._dealt(merged)
        size = wire.size(sent, "sign")
        entries, valid = wire.unpack_checked(sent, data[None, :size], "sign", backend=backend)
        indices = entries.indices.to(torch.int64) - torch.arange(sent.k, device=data.device)
        # Dealt in turn: no replica gets an index twice unless there are too many of it.
        good = valid.all() & (indices[:, merged:] > indices[:, :-merged]).all()
        dealt = (plan.chunks, plan.k, merged)
        values = 1 - 2 * entries.values.view(dealt).permute(2, 0, 1).to(plan.compute_dtype)
        where = indices.view(dealt).permute(2, 0, 1).to(plan.index_dtype)
        return Picked(where, values), bool(good)

    def _planes(self) -> tuple[int, int]:
        """Bits of a count's lower byte and of its upper one."""
        bits = self.replicas.bit_length()
        return min(bits, 8), max(bits - 8, 0)

    def _dealt(self, replicas: int) -> ChunkPlan:
        """The entries of so many replicas, the i-th index moved up by i."""
        count = replicas * self.plan.k
        return replace(self.plan, h=1, w=self.plan.totalk + count - 1, k=count)


@dataclass(frozen=True)
class Encoded:
    """Bytes of a class, and of values that are coded how they arrive and where they are."""

    parts: list[Tensor]
    seen: Tensor | None
    indices: Tensor | None


class Mean:
    """Means of a class's entries, with what an owner has kept of earlier ones."""

    def __init__(self, method: Method, form: Merged, kept: Tensor | None) -> None:
        self._by_name = method.merge == "named"
        self._form, self._kept = form, kept
        self._named: Tensor | None = None

    def __call__(self, picked: Picked) -> Picked:
        """Of entries of several replicas, `[replicas, n, k]`: `[n, slots]`, zeros where none is."""
        replicas, sent = len(picked.values), self._form.sent
        assert sent is not None
        if picked.indices is None:
            total = picked.values[0].clone()
            for value in picked.values[1:]:
                total += value
            total *= 1.0 / replicas
            if self._kept is not None:
                total = self._kept.add_(total).clone()
            return Picked(None, total)
        n, _, size = *picked.values.shape[1:], sent.totalk
        total = picked.values.new_zeros(n, size)
        count = torch.zeros_like(total)
        for index, value in zip(picked.indices, picked.values, strict=True):
            where = index.to(torch.int64)
            total.scatter_add_(1, where, value)
            count.scatter_add_(1, where, torch.ones_like(value))
        named = count > 0
        if self._by_name:
            total /= count.clamp_(min=1)
        else:
            total *= 1.0 / replicas
        # As many as there may be: those that nobody names are filled up, with zeros.
        missing = sent.k - named.sum(1, keepdim=True)
        taken = named | ((~named).cumsum(1) <= missing) if sent.k < size else None
        if self._kept is not None:
            total = torch.where(named, self._kept.add_(total), 0.0)
            self._named = named
        if taken is None:
            return Picked(None, total)
        indices = taken.nonzero()[:, 1].view(n, sent.k)
        return Picked(indices.to(sent.index_dtype), total.gather(1, indices))

    def take_out(self, seen: Tensor, indices: Tensor | None) -> None:
        """Keep what is left of the sums, once others see so much of them."""
        if self._kept is None:
            return
        if indices is not None:
            where = indices.to(torch.int64)
            seen = torch.zeros_like(self._kept).scatter_(1, where, seen.to(self._kept.dtype))
        if self._named is not None:
            seen = torch.where(self._named, seen, 0.0)
        self._kept.sub_(seen)
