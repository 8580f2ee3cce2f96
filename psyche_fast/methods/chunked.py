"""A fragment of the model: its chunks, what has been kept of them, and what is sent of it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from psyche_fast.distro.chunks import Layout, ParameterLayout
from psyche_fast.distro.shards import Parts
from psyche_fast.kernels.apply import subtract
from psyche_fast.kernels.backends import checked_backend
from psyche_fast.kernels.encode import encode, update
from psyche_fast.kernels.outer import Local, outer
from psyche_fast.kernels.plan import ChunkPlan, Entries
from psyche_fast.kernels.quantise import encode_all
from psyche_fast.methods.message import Format, Picked
from psyche_fast.methods.method import Method, Muon, Sign
from psyche_fast.methods.owners import Owners
from psyche_fast.methods.philox import keys, positions
from psyche_fast.methods.values import BITS

_LAYER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")
_TURNS_KEPT = 2
"""Whose random places are kept: those of results that have yet to come are drawn once."""
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
        kept: momentum or feedback, `[chunks, h, w]` per class, of which a share of the own last
            result (`own`) has yet to be taken out; None where nothing is kept.
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
        self.backends = [checked_backend(plan, backend) for plan in self.layout.plans]
        self.format: Format | Owners = Format(method, self.layout, self.backends, number)
        self._number = number
        self._keeps = method.what == "momentum" or method.feedback != "none"
        self.kept = self.layout.zeros() if self._keeps else None
        self.own: list[Picked] | None = None
        self._numbers = {}
        self._places: dict[tuple[ChunkPlan, int], Tensor] = {}
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
        anchors: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Take up gradients or pseudo-gradients, `kept = decay (kept - own) + factor source`.

        Args:
            sources: this rank's shards, one per parameter; None for zero.
            factor: on all of them.
            scale: a further factor; where it is not finite, all sources are left out.
            turn: number of the round.
            sender: this replica's number.
            anchors: what the sources are subtracted from, where it is not they themselves.

        Returns:
            The message.
        """
        if anchors is not None and not self.parts.are_shards:
            sources = torch._foreach_sub(list(anchors), [s for s in sources if s is not None])
            anchors = None
        sources = self.parts.of_gradients(sources)
        pick = {"topk": self._largest, "all": self._all, "random": self._drawn}[self.method.select]
        message, rooms = self.format.draft()
        picked = []
        for at, plan in enumerate(self.layout.plans):
            given: dict[str, Any] = {
                "gradients": [sources[m.position] for m in plan.members],
                "learning_rates": [factor] * len(plan.members),
                "decay": self.method.decay if self._keeps else 0.0,
                "gradient_scale": scale,
                "backend": self.backends[at],
            }
            if anchors is not None:
                given["anchors"] = [anchors[m.position] for m in plan.members]
            picked.append(pick(at, plan, given, turn, rooms[at]))
        message, seen = self.format.pack(turn, sender, picked, message)
        self.own = None
        if self.method.feedback != "none" and not self._takes_out_at_once:
            values = [p.values for p in picked] if self.method.feedback == "exact" else seen
            self.own = [
                Picked(p.indices, v.to(plan.compute_dtype))
                for plan, p, v in zip(self.layout.plans, picked, values, strict=True)
            ]
        return message

    @property
    def _takes_out_at_once(self) -> bool:
        """Whether all that is sent is taken out of what is kept where it is made.

        What is kept is needed as it was where it leads the look-ahead.
        """
        method = self.method
        return method.select == "all" and not method.lookahead and method.values != "codebook4"

    def _previous(self, at: int) -> dict[str, Any]:
        if self.own is None:
            return {}
        indices = self.own[at].indices
        assert indices is not None
        entries = Entries(indices, self.own[at].values, unique=True)
        return {"previous": entries, "share": self.method.subtract}

    def _state(self, at: int) -> Tensor:
        """What is kept of a class, zeros where nothing is."""
        if self.kept is not None:
            return self.kept[at]
        plan = self.layout.plans[at]
        return plan.basis_w.new_zeros(plan.chunks, plan.h, plan.w)

    def _largest(
        self, at: int, plan: ChunkPlan, given: dict[str, Any], turn: int, room: Tensor | None
    ) -> Picked:
        entries = encode(plan, self._state(at), **given, **self._previous(at))
        return Picked(entries.indices, entries.values)

    def _drawn(
        self, at: int, plan: ChunkPlan, given: dict[str, Any], turn: int, room: Tensor | None
    ) -> Picked:
        state = self._state(at)
        update(plan, state, **given, **self._previous(at))
        where = self.places(plan, turn)
        return Picked(where, state.view(plan.chunks, plan.totalk).gather(1, where))

    def _all(
        self, at: int, plan: ChunkPlan, given: dict[str, Any], turn: int, room: Tensor | None
    ) -> Picked:
        state = None if self.kept is None else self.kept[at]
        if self.own is not None and state is not None:
            state.view(plan.chunks, plan.totalk).sub_(
                self.own[at].values, alpha=self.method.subtract
            )
        at_once, feedback = self._takes_out_at_once, self.method.feedback
        bits = BITS.get(self.method.values) if at_once else None
        out = None
        if bits is None and at_once and room is not None:
            out = room
        elif bits is None:
            is_narrow = at_once and self.method.values == "bf16"
            dtype = torch.bfloat16 if is_narrow else plan.compute_dtype
            out = plan.basis_w.new_empty(plan.chunks, plan.totalk, dtype=dtype)
        share = self.method.subtract if at_once and feedback != "none" else 0.0
        codes = encode_all(
            plan, state, **given, bits=bits, out=out, share=share, exact=feedback == "exact"
        )
        return Picked(None, plan.basis_w if out is None else out, codes)

    def places(self, plan: ChunkPlan, turn: int) -> Tensor:
        """The positions that a round's random selection takes, int64 `[n, k]`."""
        if (plan, turn) not in self._places:  # when it was sent
            plans = self.layout.plans
            named = [self.names[m.position] for p in plans for m in p.members]
            drawn = keys({n: self._numbers[n] for n in named}, seed=self.method.seed, turn=turn)
            self._places = {k: v for k, v in self._places.items() if k[1] > turn - _TURNS_KEPT}
            for p, own in zip(plans, drawn.split([p.chunks for p in plans]), strict=True):
                self._places[p, turn] = positions(own, p.totalk, p.k)
        return self._places[plan, turn]

    def merge(self, received: Sequence[Picked], turn: int) -> list[Tensor]:
        """The mean of the replicas' results, transformed back: this rank's shards, in order."""
        plans = self.layout.plans
        if self.method.transform == "dct" and isinstance(self.method.outer, Sign | Muon):
            return self.shards(
                [self._clean(at, plan, received[at]) for at, plan in enumerate(plans)]
            )
        merged = [
            torch.zeros(p.shape, dtype=plans[0].compute_dtype, device=plans[0].device)
            for p in self.layout.parameters
        ]
        self.step_out(merged, received, turn, -1.0)
        return self.parts.shards(merged)

    def signs(self, received: Sequence[Picked]) -> list[Picked]:
        """Of the replicas' mean, as one replica's, where all send the same entries."""
        return [Picked(None, _mean(p.values).sign_().unsqueeze(0)) for p in received]

    def step_out(
        self,
        shared: Sequence[Tensor],
        received: Sequence[Picked],
        turn: int,
        length: float,
        momenta: Sequence[Tensor] | None = None,
        momentum: float = 0.0,
        local: Local | None = None,
    ) -> None:
        """The linear outer step, as `psyche_fast.kernels.outer` has it, of this rank's chunks.

        Args:
            shared: tensors of the layout's parameters.
            received: the replicas' results.
            turn: the number of their round.
            length: of the step.
            momenta: see there.
            momentum: see there.
            local: see there.
        """
        for at, (plan, p) in enumerate(zip(self.layout.plans, received, strict=True)):
            places = [m.position for m in plan.members]
            results: Entries | Tensor
            replicas = len(p.values) if self.method.merge == "mean" else None
            if self.method.select == "random":
                where = self.places(plan, turn)
                results, replicas = Entries(where, _mean(p.values), unique=True), None
            elif p.indices is None and not plan.is_transformed:
                results = p.values
            else:
                results = side_by_side(plan, p)
            own = None
            if local is not None:
                since = local.since
                own = Local(
                    [local.tensors[i] for i in places], local.mix,
                    None if since is None else [since[i] for i in places],
                )  # fmt: skip
            outer(
                plan, [shared[i] for i in places], results, length, replicas=replicas,
                momenta=None if momenta is None else [momenta[i] for i in places],
                momentum=momentum, local=own, backend=self.backends[at],
            )  # fmt: skip

    def _clean(self, at: int, plan: ChunkPlan, p: Picked) -> Tensor:
        """The mean `[chunks, h, w]`, without what rounding leaves of what cancels.

        That would have a sign.
        """
        chunks = p.values.new_zeros(plan.chunks, plan.h, plan.w)
        if self.method.merge == "named":
            subtract(plan, chunks, side_by_side(plan, p), backend=self.backends[at])
            chunks.neg_()
        else:
            for number, value in enumerate(p.values):
                one = Picked(None if p.indices is None else p.indices[number, None], value[None])
                subtract(plan, chunks, side_by_side(plan, one), backend=self.backends[at])
            chunks.div_(-len(p.values))
        limit = chunks.abs().amax((1, 2), keepdim=True) if chunks.numel() else 0.0
        noise = limit * (_NOISE * torch.finfo(chunks.dtype).eps)
        return torch.where(chunks.abs() <= noise, 0.0, chunks)

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


def _mean(values: Tensor) -> Tensor:
    """Of the replicas' values, added up in their order."""
    total = values[0].clone()
    for value in values[1:]:
        total += value
    return total.mul_(1.0 / len(values))


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
