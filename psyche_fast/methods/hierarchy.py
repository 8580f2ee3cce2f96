"""`Hierarchy`: methods in levels: dense in a rack, DisTrO between racks, SparseLoCo between sites.

Each level has the level below in place of its local steps: where a round of it ends, its
pseudo-gradient is `D = A - A_below`, the same on all ranks that share `A_below`; what comes of it
becomes the new `A_below`, and further down the replicas' own parameters go with it. Momentum,
feedback and moments below live on, as AdamW's do over a round of local steps. Below all others may
be levels of gradients (`dense`): what they hand on is the mean, of which the next level takes its
local step or momentum.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from math import prod
from typing import Any, TypeAlias

import torch
from torch import Tensor

from psyche_fast.methods.message import Format
from psyche_fast.methods.method import SGD, Method
from psyche_fast.methods.owners import Owners
from psyche_fast.methods.presets import get
from psyche_fast.methods.replica import Faults, Replica
from psyche_fast.methods.steps import copied

Levels: TypeAlias = Sequence[tuple[int, Method]]
"""How many of the level below learn from each other, and how; the innermost first."""


def checked_levels(levels: Levels) -> list[tuple[int, Method]]:
    """The levels of a hierarchy, once they are known to go together.

    Raises:
        TypeError: something that is no level.
        ValueError: levels that do not go together, with the reason.
    """
    found: list[tuple[int, Method]] = []
    if not isinstance(levels, list | tuple) or not levels:
        raise TypeError(f"levels: wanted pairs of a number and a method, got {levels!r}")
    for at, level in enumerate(levels):
        if not isinstance(level, tuple | list) or len(level) != 2:
            raise TypeError(f"level {at + 1}: wanted a number and a method, got {level!r}")
        count, method = level
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"level {at + 1}: wanted a number of at least 1, got {count!r}")
        if not isinstance(method, Method):
            raise TypeError(f"level {at + 1}: wanted a Method, got {method!r}")
        found.append((count, method))
    for at, ((_, below), (_, method)) in enumerate(pairwise(found), start=1):
        reason = _misfit(below, method)
        if reason is not None:
            raise ValueError(f"level {at + 1} over level {at}: {reason}")
    return found


def _misfit(below: Method, method: Method) -> str | None:
    """Why a level cannot stand on the one below, if so."""
    if below.what == "gradient":
        if below.delay:
            return f"the mean gradient is wanted in its own step: delay=0 below, got {below.delay}"
        inner = method.inner if method.is_local else None
        if below.outer not in (get("dense").outer, SGD(rate=1.0), inner, method.outer):
            return (
                f"of a mean gradient below the step is the upper level's, by "
                f"{inner or method.outer!r}: outer={below.outer!r} below would be none"
            )
        return None
    if not method.is_local:
        return (
            f"what={method.what!r} takes gradients, which only levels of what='gradient' hand on; "
            f"below is what={below.what!r}"
        )
    if method.window % below.window:
        return (
            f"rounds of {method.window} steps are no multiple of those of {below.window} below, at "
            "whose ends alone parameters are shared there"
        )
    return None


class _HandOn:
    """In an outer step's place: the mean becomes the gradient of the level above."""

    decays = False

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._parameters, self.has_mean = parameters, False

    def decay(self, rate: float) -> None:
        self.has_mean = False

    def length(self, rate: float) -> None:
        """None: the mean itself is wanted, not a step of it."""

    def step(self, merged: Mapping[str, Tensor], rate: float) -> None:
        for name, mean in merged.items():
            self._parameters[name].grad = mean.to(self._parameters[name].dtype)
        self.has_mean = True

    def state(self) -> dict[str, Any]:
        return {}

    def load(self, state: Mapping[str, Any]) -> None:
        assert not state


class Hierarchy:
    """One rank's part of a hierarchy, in the loop of a rank.

    ::

        hierarchy.before_forward(step)
        ...                                      # forward, backward: gradients in .grad
        hierarchy.local(lr)
        for at in range(len(hierarchy.levels)):  # one level is through before the next begins
            message = hierarchy.send(at)         # None where this step ends no round of it
            if message is not None:
                pending[at].append(exchange(at, message))
            while hierarchy.due(at):
                hierarchy.receive(at, pending[at].popleft())  # uint8 [count of the level, size]

    Ranks are numbered from the innermost level outwards: `rank = i0 + n0 (i1 + n1 (i2 + ...))` with
    the index `i` among the `n` of each level. At a level, ranks that differ in lower indices alone
    are a site: they send the same, and it is their counterparts' in the other sites.

    Args:
        levels: see `Levels`; the `inner` of a level is used where nothing but means of gradients is
            below it.
        parameters: by name, equal on all ranks.
        rank: this rank's number, from 0.
        undecayed: names of parameters without weight decay.
        backend: as of `Replica`.

    Attributes:
        methods: of the levels, innermost first.
        counts: how many each has.
        levels: this rank's replica of each.
        step: how many steps have been made.

    Raises:
        TypeError: as of `checked_levels` and `Replica`.
        ValueError: likewise; or narrow parameters below a level that takes a mean gradient.
    """

    def __init__(
        self,
        levels: Levels,
        parameters: Mapping[str, Tensor],
        *,
        rank: int,
        undecayed: Container[str] = (),
        backend: str = "auto",
    ) -> None:
        found = checked_levels(levels)
        self.counts = [count for count, _ in found]
        self.methods = [method for _, method in found]
        if not 0 <= rank < prod(self.counts):
            raise ValueError(f"rank must be from 0 to {prod(self.counts) - 1}, got {rank}")
        # How many hand on means of gradients; what makes steps of a gradient stands on them.
        self._base = sum(m.what == "gradient" for m in self.methods[:-1])
        if self._base:
            for name, p in parameters.items():
                if p.dtype not in (torch.float32, torch.float64):
                    raise ValueError(
                        f"parameter {name}: a mean gradient wants float32, not {p.dtype}"
                    )
        self._means = [_HandOn(parameters) for _ in range(self._base)]
        self.levels: list[Replica] = []
        named = parameters
        for at, (count, method) in enumerate(found):
            index = rank // prod(self.counts[:at]) % count
            options: dict[str, Any] = {"undecayed": undecayed, "backend": backend}
            if at < self._base:
                method = replace(method, outer=SGD(rate=1.0))
            elif at > self._base:
                # Its local steps are the level's below: an optimiser that never makes any.
                options["inner"] = torch.optim.SGD(list(named.values()), lr=0.0)
            replica = Replica(method, named, replica=index, replicas=count, **options)
            if at < self._base:
                replica.outer = self._means[at]  # type: ignore[assignment]  # as far as it is used
            else:
                named = replica.plain()
            self.levels.append(replica)
        self._rate, self._is_shared = 0.0, False

    @property
    def step(self) -> int:
        """See the class."""
        return self.levels[-1].step

    def before_forward(self, step: int) -> None:
        """As of `Replica`."""
        self._put_own()
        for replica in self.levels:
            replica.before_forward(step)

    def local(self, lr: float, clip: Tensor | float | None = None) -> None:
        """As of `Replica`: the lowest level's step."""
        self._rate = float(lr)
        self.levels[0].local(lr, clip)

    def send(self, at: int) -> Tensor | None:
        """A level's message of this step, once all those below are through; None for no message."""
        replica = self.levels[at]
        if at > self._base:
            replica.stepped()
        elif at > 0:
            replica.local(self._rate, 1.0 if self._means[at - 1].has_mean else float("nan"))
        return replica.send()

    def due(self, at: int) -> bool:
        """Whether the next thing to do at a level is `receive`."""
        return self.levels[at].due()

    def receive(self, at: int, messages: Tensor, leave_out: Faults | None = None) -> Faults:
        """As of `Replica`, at a level; what is below goes with what has changed there."""
        below = self.levels[self._base : at]
        before = [copied(r.plain()) if r.keeps_own else {} for r in below]
        faults = self.levels[at].receive(messages, leave_out)
        for replica, old in zip(reversed(below), reversed(before), strict=True):
            replica.follow(old)
        return faults

    def put_shared(self) -> None:
        """As of `Replica`: of the outermost level."""
        for replica in reversed(self.levels[self._base :]):
            replica.put_shared()
        if not self.methods[self._base].is_local:
            self.levels[self._base].follow({})
        self._is_shared = True

    def _put_own(self) -> None:
        if not self._is_shared:
            return
        for replica in reversed(self.levels[self._base :]):  # which each one below begins with
            replica.put_own()
        if not self.methods[self._base].is_local:
            self.levels[self._base].follow({})
        self._is_shared = False

    def plain(self) -> Mapping[str, Tensor]:
        """The parameters that all ranks share, not copies: as of the outermost level."""
        return self.levels[-1].plain()

    def state_dict(self) -> dict[str, Any]:
        """Everything for an exact resume between any two steps; copies."""
        if was_shared := self._is_shared:
            self._put_own()
        states = [replica.state_dict() for replica in self.levels]
        if was_shared:
            self.put_shared()
        for state in states[self._base + 1 :]:
            state["local"] = {}  # what is shared below
        return {"levels": states, "rate": self._rate}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` gave, parameters included.

        Raises:
            ValueError: it is of other levels, another place in them, or another model.
        """
        states = state.get("levels", ())
        if len(states) != len(self.levels):
            raise ValueError(f"saved levels: wanted {len(self.levels)}, got {len(states)}")
        shared: Mapping[str, Any] = {}
        for at, (replica, saved) in enumerate(zip(self.levels, states, strict=True)):
            replica.load_state_dict({**saved, "local": shared} if at > self._base else saved)
            shared = saved["shared"]
        self._rate = state["rate"]


class Level:
    """A level of a rank, as exchanges want a replica: what it receives goes through all below.

    Args:
        hierarchy: of the rank.
        at: the level's number, from 0.

    Attributes:
        method: as of `Replica`.
        replica: likewise.
        replicas: likewise.
        inside: likewise.
    """

    def __init__(self, hierarchy: Hierarchy, at: int) -> None:
        self._hierarchy, self._at, self._own = hierarchy, at, hierarchy.levels[at]
        self.method, self.inside = self._own.method, self._own.inside
        self.replica, self.replicas = self._own.replica, self._own.replicas

    @property
    def step(self) -> int:
        """As of `Replica`."""
        return self._own.step

    def send(self) -> Tensor | None:
        """As of `Replica`, once all levels below are through."""
        return self._hierarchy.send(self._at)

    def due(self) -> bool:
        """As of `Replica`."""
        return self._own.due()

    def receive(self, messages: Tensor, leave_out: Faults | None = None) -> Faults:
        """As of `Replica`."""
        return self._hierarchy.receive(self._at, messages, leave_out)

    def flight(self, at: int = -1) -> tuple[Format | Owners, int]:
        """As of `Replica`."""
        return self._own.flight(at)

    def in_flight(self) -> list[Tensor]:
        """As of `Replica`."""
        return self._own.in_flight()

    def plain(self) -> Mapping[str, Tensor]:
        """As of `Replica`."""
        return self._own.plain()
