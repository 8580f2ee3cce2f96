"""A fragment of the model: its chunks, what has been kept of them, and what is sent of it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from psyche_fast.distro.chunks import Layout, ParameterLayout
from psyche_fast.distro.shards import Parts
from psyche_fast.kernels.apply import subtract
from psyche_fast.kernels.backends import ENVIRONMENT, checked_backend, explain
from psyche_fast.kernels.encode import encode
from psyche_fast.kernels.plan import ChunkPlan, Entries, chunk_view
from psyche_fast.methods.message import Format, Picked
from psyche_fast.methods.method import Method, Muon, Sign
from psyche_fast.methods.owners import Owners
from psyche_fast.methods.philox import positions

_LAYER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")
_NOISE = 64
"""Of a chunk's largest value times the type's epsilon."""


def cut(method: Method, names: Sequence[str], tensors: Sequence[Tensor]) -> Layout:
    """The chunks of parameters: a method's matrices in blocks, vectors in as many elements."""
    return Layout(_wholes(method, names, tensors), transform=method.transform == "dct")


def _wholes(
    method: Method, names: Sequence[str], tensors: Sequence[Tensor]
) -> list[ParameterLayout]:
    layouts = []
    for name, tensor in zip(names, tensors, strict=True):
        is_flat = tensor.dim() < 2 and method.transform == "none"
        layout = ParameterLayout.of(
            name,
            tensor.shape,
            tensor.dtype,
            tensor.device,
            compression_chunk=method.chunk**2 if is_flat else method.chunk,
            compression_topk=method.chunk**2 if method.select == "all" else method.k,
        )
        layouts.append(layout)
    return layouts


def fragment_names(method: Method, names: list[str]) -> list[list[str]]:
    """Which parameters are a fragment's.

    A parameter's layer is the first whole number between the dots of its name. Layers are strided:
    the n-th is of fragment `n mod fragments`; what has no number goes with the first. Where no name
    has one, the n-th parameter is of fragment `n mod fragments`.

    Raises:
        ValueError: fewer layers than fragments.
    """
    found = {name: _LAYER.search(name) for name in names}
    layers = sorted({int(match[1]) for match in found.values() if match})
    places = {layer: at for at, layer in enumerate(layers)}
    fragments: list[list[str]] = [[] for _ in range(method.fragments)]
    for at, (name, match) in enumerate(found.items()):
        place = at if not layers else places[int(match[1])] if match else 0
        fragments[place % method.fragments].append(name)
    if not all(fragments):
        raise ValueError(
            f"fragments={method.fragments} wants as many layers, got {len(layers) or len(names)}"
        )
    return fragments


class Fragment:
    """One fragment: state, selection, messages and the mean of what has come.

    Args:
        method: whose.
        number: of the fragment.
        names: of its parameters.
        tensors: the shared parameters, float32 or float64, of which this rank may have shards.
            Making this, and whatever has to do with these, is a collective of the ranks that share
            them where a shard's edge cuts a chunk.
        backend: as of `DistroStep`.

    Attributes:
        names: as given.
        parts: the way from shards to this rank's chunks and back.
        layout: this rank's chunks.
        backends: resolved backend of every chunk class.
        format: its messages.
        kept: momentum or feedback, `[chunks, h, w]` per class, of which the own last result
            (`own`) has yet to be taken out; None where nothing is kept.
        own: what is to be taken out, per class; None where there is nothing.
    """

    def __init__(
        self,
        method: Method,
        number: int,
        names: Sequence[str],
        tensors: Sequence[Tensor],
        backend: str,
    ) -> None:
        self.method, self.names = method, list(names)
        self.parts = Parts(tensors, _wholes(method, names, tensors))
        self.layout = Layout(self.parts.layouts, transform=method.transform == "dct")
        self.backends = [_backend(plan, backend) for plan in self.layout.plans]
        self.format: Format | Owners = Format(method, self.layout, self.backends, number)
        self._number = number
        self._keeps = method.what == "momentum" or method.feedback != "none"
        self.kept = self.layout.zeros() if self._keeps else None
        self.own: list[Picked] | None = None
        self._numbers = {}
        if method.select == "random":
            for at, (name, whole) in enumerate(zip(names, self.parts.wholes, strict=True)):
                every = torch.arange(whole.chunks, device=whole.device).view(whole.lead)
                self._numbers[name] = self.parts.own(at, every).reshape(-1)

    def divide(self, replica: int, replicas: int) -> None:
        """Have owners merge its results, of which this replica is one."""
        method, layout = self.method, self.layout
        self.format = Owners(method, layout, self.backends, self._number, replica, replicas)

    def compress(
        self,
        sources: Sequence[Tensor | None],
        factor: float,
        scale: float | Tensor | None,
        turn: int,
        sender: int,
    ) -> Tensor:
        """Take up gradients or pseudo-gradients, `kept = decay (kept - own) + factor source`.

        Args:
            sources: this rank's shards, one per parameter; None for zero.
            factor: on all of them.
            scale: a further factor; where it is not finite, all sources are left out.
            turn: number of the round.
            sender: this replica's number.

        Returns:
            The message.
        """
        sources = self.parts.of_gradients(sources)
        kept = self.layout.zeros() if self.kept is None else self.kept
        pick = self._largest if self.method.select == "topk" else self._at_known_places
        picked = [
            pick(at, plan, kept[at], [sources[m.position] for m in plan.members], factor, scale)
            for at, plan in enumerate(self.layout.plans)
        ]
        if self.method.select == "random":
            places = [self.places(plan, turn) for plan in self.layout.plans]
            picked = [
                Picked(where, p.values.gather(1, where))
                for where, p in zip(places, picked, strict=True)
            ]
        message, seen = self.format.pack(turn, sender, picked)
        self.own = None
        if self.method.feedback != "none":
            alpha = self.method.subtract
            values = [p.values for p in picked] if self.method.feedback == "exact" else seen
            self.own = [Picked(p.indices, v * alpha) for p, v in zip(picked, values, strict=True)]
        return message

    def _largest(
        self,
        at: int,
        plan: ChunkPlan,
        kept: Tensor,
        sources: list[Tensor | None],
        factor: float,
        scale: float | Tensor | None,
    ) -> Picked:
        previous = None
        if self.own is not None:
            indices = self.own[at].indices
            assert indices is not None
            previous = Entries(indices, self.own[at].values, unique=True)
        entries = encode(
            plan,
            kept,
            sources,
            [factor] * len(sources),
            decay=self.method.decay if self._keeps else 0.0,
            gradient_scale=scale,
            previous=previous,
            backend=self.backends[at],
        )
        return Picked(entries.indices, entries.values)

    def _at_known_places(
        self,
        at: int,
        plan: ChunkPlan,
        kept: Tensor,
        sources: list[Tensor | None],
        factor: float,
        scale: float | Tensor | None,
    ) -> Picked:
        """All of every chunk, a copy."""
        flat = kept.view(plan.chunks, plan.totalk)
        if self.own is not None:
            own = self.own[at]
            if own.indices is None:
                flat.sub_(own.values)
            else:
                flat.scatter_add_(1, own.indices, -own.values)
        if self._keeps:
            kept.mul_(self.method.decay)
        wide = None if scale is None else torch.as_tensor(scale, dtype=kept.dtype)
        for member, source in zip(plan.members, sources, strict=True):
            if source is None:
                continue
            chunks = chunk_view(source, plan.h, plan.w).to(kept.dtype)
            if wide is not None:
                wide = wide.to(kept.device)
                chunks = torch.where(wide.isfinite(), chunks * wide, 0.0)
            target = kept[member.start : member.start + member.count]
            target.view(chunks.shape).add_(chunks, alpha=factor)
        return Picked(None, flat.clone())

    def places(self, plan: ChunkPlan, turn: int) -> Tensor:
        """The positions that a round's random selection takes, int64 `[n, k]`."""
        names = [self.names[m.position] for m in plan.members]
        seed = self.method.seed
        return torch.cat(
            [
                positions(name, self._numbers[name], plan.totalk, plan.k, seed=seed, turn=turn)
                for name in names
            ]
        )

    def merge(self, received: Sequence[Picked], turn: int) -> list[Tensor]:
        """The mean of the replicas' results, transformed back: this rank's shards, in order."""
        merged = []
        for at, (plan, p) in enumerate(zip(self.layout.plans, received, strict=True)):
            chunks = self._mean(at, plan, p, turn)
            if plan.is_transformed and isinstance(self.method.outer, Sign | Muon):
                # What cancels is what rounding leaves of it, which would have a sign.
                limit = chunks.abs().amax((1, 2), keepdim=True) if chunks.numel() else 0.0
                noise = limit * (_NOISE * torch.finfo(chunks.dtype).eps)
                chunks = torch.where(chunks.abs() <= noise, 0.0, chunks)
            merged.append(chunks)
        return self.shards(merged)

    def shards(self, chunks: Sequence[Tensor]) -> list[Tensor]:
        """This rank's shard of each parameter from chunks `[n, h, w]` of each class."""
        parts: dict[int, Tensor] = {}
        for plan, of_class in zip(self.layout.plans, chunks, strict=True):
            for m in plan.members:
                layout = self.layout.parameters[m.position]
                own = of_class[m.start : m.start + m.count].view(*m.lead, plan.h, plan.w)
                if len(layout.shape) >= 2:
                    own = own.transpose(-3, -2)
                parts[m.position] = own.reshape(layout.shape)
        return self.parts.shards([parts[at] for at in range(len(self.names))])

    def _mean(self, at: int, plan: ChunkPlan, p: Picked, turn: int) -> Tensor:
        """`[chunks, h, w]`."""
        replicas = len(p.values)
        chunks = p.values.new_zeros(plan.chunks, plan.h, plan.w)
        if p.indices is not None and self.method.merge == "named":
            subtract(plan, chunks, side_by_side(plan, p), backend=self.backends[at])
            return chunks.neg_()
        if p.indices is not None:
            for index, value in zip(p.indices, p.values, strict=True):
                entries = Entries(index, value, unique=True)
                subtract(plan, chunks, entries, backend=self.backends[at])
            return chunks.div_(-replicas)
        total = p.values[0].clone()
        for value in p.values[1:]:
            total += value
        total /= replicas
        if self.method.select == "random":
            chunks.view(plan.chunks, plan.totalk).scatter_(1, self.places(plan, turn), total)
        elif plan.is_transformed:
            everything = torch.arange(plan.k, device=plan.device).to(plan.index_dtype)
            entries = Entries(everything.expand(total.shape), total, unique=True)
            subtract(plan, chunks, entries, backend=self.backends[at])
            chunks.neg_()
        else:
            chunks = total.view(chunks.shape)
        return chunks

    def clipped(self, received: Sequence[Picked]) -> list[Picked]:
        """Every replica's values of a parameter scaled down to the lower median of the norms."""
        clipped = [Picked(p.indices, p.values.clone()) for p in received]
        pairs = list(zip(self.layout.plans, clipped, strict=True))
        own = {
            m.position: p.values[:, m.start : m.start + m.count] for plan, p in pairs
            for m in plan.members
        }  # fmt: skip
        squares = [own[at].flatten(1).square().sum(1) for at in range(len(self.names))]
        norms = self.parts.summed(torch.stack(squares)).sqrt()
        medians = norms.median(1, keepdim=True).values
        for at, factors in enumerate((medians / (norms + 1e-8)).clamp(max=1.0)):
            own[at].mul_(factors.view(-1, 1, 1))
        return clipped

    def momentum(self) -> dict[str, Tensor]:
        """What is kept by parameter, in the encoded shape; see `Parts.whole`."""
        views = [] if self.kept is None else self.layout.views(self.kept)
        return {self.names[at]: self.parts.whole(at, view) for at, view in enumerate(views)}

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Copies, by kind and parameter: what is kept, `[chunks, h, w]`, and what to take out.

        And what has been kept of merged results, where this replica owns chunks.
        """
        found: dict[str, dict[str, Tensor]] = {}
        merged = self.format.state()
        for at, plan in enumerate(self.layout.plans):
            kinds = {"kept": None if self.kept is None else self.kept[at]}
            if merged is not None:
                kinds["merged"] = merged[at]
            if self.own is not None:
                kinds["indices"] = self.own[at].indices
                kinds["values"] = self.own[at].values
            there = [(kind, tensor) for kind, tensor in kinds.items() if tensor is not None]
            for kind, tensor in there:
                for m in plan.members:
                    own = tensor[m.start : m.start + m.count].clone()
                    found.setdefault(kind, {})[self.names[m.position]] = own
        return found

    def load(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Take up what `state` gave.

        Raises:
            ValueError: it lacks a parameter, or has another shape of it.
        """

        def of(kind: str, like: tuple[int, ...] | None, plan: ChunkPlan) -> Tensor:
            parts = []
            for m in plan.members:
                name = self.names[m.position]
                part = state[kind].get(name)
                if part is None or (like and tuple(part.shape) != (m.count, *like)):
                    got = "nothing" if part is None else list(part.shape)
                    raise ValueError(
                        f"{kind} of parameter {name}: wanted {[m.count, *(like or ())]}, got {got}"
                    )
                parts.append(part.to(plan.device))
            return torch.cat(parts)

        plans = self.layout.plans
        if ("kept" in state) != (self.kept is not None):
            raise ValueError("the saved state keeps something else than this method: `kept`")
        if self.kept is not None:
            loaded = [of("kept", (plan.h, plan.w), plan) for plan in plans]
            for kept, new in zip(self.kept, loaded, strict=True):
                kept.copy_(new)
        merged = "merged" in state
        self.format.load([of("merged", (p.totalk,), p) for p in plans] if merged else None)
        self.own = None
        if "values" in state:
            self.own = [
                Picked(
                    of("indices", (plan.k,), plan) if "indices" in state else None,
                    of("values", (plan.k,), plan),
                )
                for plan in plans
            ]


def _backend(plan: ChunkPlan, asked: str) -> str:
    """The backend of a class: the kernels transform all that they select from.

    Raises:
        ValueError: kernels are asked for that cannot take this class, or cannot run.
    """
    if plan.is_transformed:
        return checked_backend(plan, asked)
    name, reason = explain(plan.device, asked)
    if name != "torch" and (asked != "auto" or os.environ.get(ENVIRONMENT, "auto") != "auto"):
        raise ValueError(f"{reason}, but a method without transform has no kernels yet")
    return "torch"


def side_by_side(plan: ChunkPlan, p: Picked) -> Entries:
    """All replicas' entries of a class, `[n, replicas * k]` in the order of replicas."""
    peers, n, k = p.values.shape
    if p.indices is None:
        everything = torch.arange(k, device=plan.device).to(plan.index_dtype)
        indices = everything.repeat(peers).expand(n, peers * k)
    else:
        indices = p.indices.transpose(0, 1).reshape(n, peers * k)
    values = p.values.transpose(0, 1).reshape(n, peers * k)
    return Entries(indices, values, unique=peers == 1)
