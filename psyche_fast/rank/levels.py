"""`--levels`: an optimiser for methods in levels, behind the face of the others."""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor

from psyche_fast import config
from psyche_fast.exchanges import Exchange
from psyche_fast.methods import SGD, Hierarchy, Method, Rounds, rounds_of
from psyche_fast.methods.exchanges import traffic
from psyche_fast.methods.hierarchy import Level, checked_levels
from psyche_fast.methods.traffic import ways
from psyche_fast.rank.clock import Transfer
from psyche_fast.rank.hub import Here, Peers
from psyche_fast.rank.method import filled, method_by, skeleton
from psyche_fast.rank.optimizers import Optimizer
from psyche_fast.rank.state import Piece, Reader

_LEVEL = re.compile(r"\s*(\d+)\s*:\s*([^\s(),:]+)\s*(?:\(([^()]*)\))?\s*(?:,|$)", re.ASCII)
_FIELDS = {"k": "topk", "decay": "beta", "clip": "norm_clip"}
"""What fields of methods are called that flags have other names for."""
_WANTED = "wanted 2:dense,2:distro,2:sparseloco(every=30,topk=64), the innermost first"


def levels_of(run: config.RunConfig) -> list[tuple[int, Method]] | None:
    """The levels that `--levels` names, checked as a whole; None without it.

    Each has the options of `--method` in parentheses, by the names of their flags or of the
    method's fields, and the run's AdamW and weight decay as of `--method`.

    Raises:
        ValueError: they are none, do not go together or are not of so many replicas.
        TypeError: likewise.
    """
    text = run.exchange.levels
    if text is None:
        return None
    if run.model.param_dtype != "float32":
        raise ValueError(
            f"--levels steps the parameters themselves: it wants --param-dtype float32, got "
            f"{run.model.param_dtype}"
        )
    levels, at = [], 0
    while at < len(text):
        found = _LEVEL.match(text, at)
        if found is None:
            raise ValueError(f"--levels {text!r}: {_WANTED}; got {text[at:]!r}")
        levels.append((int(found[1]), _method(found[2], found[3] or "", run)))
        at = found.end()
    # Of means of gradients the step is the level's above.
    levels = [
        (n, replace(m, outer=SGD(rate=1.0)) if m.what == "gradient" and above else m)
        for (n, m), above in zip(levels, range(len(levels) - 1, -1, -1), strict=True)
    ]
    try:
        found_levels = checked_levels(levels)
    except (TypeError, ValueError) as error:
        raise type(error)(f"--levels {text!r}: {error}") from error
    ranks, asked = prod(n for n, _ in levels), run.parallelism.copies
    if ranks != asked:
        which = "--simulate" if run.parallelism.simulate else "--replicas"
        raise ValueError(f"--levels {text!r} are {ranks} replicas, {which} is {asked}")
    return found_levels


def _method(name: str, options: str, run: config.RunConfig) -> Method:
    given: dict[str, str] = {}
    for option in filter(None, (part.strip() for part in options.split(","))):
        key, equals, value = (part.strip() for part in option.partition("="))
        field = _FIELDS.get(key, key.replace("-", "_"))
        if not equals or field in ("method", "levels", "link") or field in given:
            raise ValueError(
                f"--levels: {name}({options}): {option!r} is no option=value of its own"
            )
        given[field] = value
    try:
        read = msgspec.convert({**given, "method": f"{name} in levels"}, Exchange, strict=False)
        return method_by(name, read, run.optimizer)
    except (TypeError, ValueError) as error:  # msgspec's are ValueErrors
        raise ValueError(f"--levels: {name}({options}): {error}") from error


class LevelsOptimizer(Optimizer):
    """A rank's part of a `Hierarchy`.

    Between `plain` and the next `look_ahead` the model's parameters are those that the outermost
    level shares.

    Args:
        parameters: by name; float32, whole.
        levels: of `levels_of`.
        peers: all ranks, each a replica; None for one.
        undecayed: names of the parameters without weight decay.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        levels: Sequence[tuple[int, Method]],
        peers: dist.ProcessGroup | Peers | None,
        undecayed: Container[str] = (),
    ) -> None:
        self._parameters, self._levels = parameters, levels
        self._peers, self._undecayed = peers, undecayed
        self._rank = 0
        if peers is not None:
            self._rank = peers.rank if isinstance(peers, Peers) else dist.get_rank(peers)
        self._made: tuple[Hierarchy, Sequence[Rounds | Here]] | None = None
        self._transfers: list[Transfer] = []
        self._refused: dict[int, int] = {}

    @property
    def bytes_sent(self) -> int:
        """What this rank hands over in the step, at all levels; within sites nothing is counted."""
        return sum(t.up for t in self._transfers)

    @property
    def bytes_received(self) -> int:
        """What comes from other sites by that."""
        return sum(t.down for t in self._transfers)

    @property
    def transfers(self) -> Sequence[Transfer]:
        """See `Optimizer`; a link is the outermost level's."""
        return self._transfers

    @property
    def refused_results(self) -> dict[int, int]:
        """Replicas, or the first of sites, whose results were refused in the last `step`."""
        return self._refused

    def _hierarchy(self) -> tuple[Hierarchy, Sequence[Rounds | Here]]:
        """Made of the parameters that a checkpoint may have brought; a collective at first."""
        if self._made is None:
            hierarchy = Hierarchy(
                self._levels, self._parameters, rank=self._rank, undecayed=self._undecayed
            )
            levels = [Level(hierarchy, at) for at in range(len(self._levels))]
            peers = self._peers
            rounds: Sequence[Rounds | Here]
            if isinstance(peers, Peers):
                rounds = [
                    peers.rounds(level, (at, self._rank - level.replica * self._size(at)))
                    for at, level in enumerate(levels)
                ]
            elif peers is not None:
                rounds = rounds_of(hierarchy, peers)
            else:
                rounds = [Rounds(level, None) for level in levels]
            self._made = hierarchy, rounds
        return self._made

    def _size(self, at: int) -> int:
        """Ranks of a site at a level."""
        return prod(count for count, _ in self._levels[:at])

    def look_ahead(self, prev_lr: float) -> None:
        """Give the model this rank's own parameters again, where the gradient is wanted."""
        hierarchy, _ = self._hierarchy()
        hierarchy.before_forward(hierarchy.step)

    def after_backward(self, prev_lr: float, lr: float, factor: Tensor) -> None:
        """The innermost level's step; what it ends is sent on its way."""
        hierarchy, rounds = self._hierarchy()
        self._transfers = self._of_step(hierarchy)
        hierarchy.local(lr, factor)
        rounds[0].send()

    def _of_step(self, hierarchy: Hierarchy) -> list[Transfer]:
        """What the step that comes sends, by the forms of its messages."""
        transfers = []
        for at, replica in enumerate(hierarchy.levels):
            form = replica.form(replica.step)
            if form is None or self._rank % self._size(at):
                continue
            up, down = traffic(form, replica.replica, replica.replicas)
            outermost = at == len(hierarchy.levels) - 1
            if up:
                around = ways(replica.method, replica.replicas)
                transfers.append(Transfer(up, down, replica.method.delay, around, outermost))
        return transfers

    def stages(self, lr: float) -> Iterator[None]:
        """See `Optimizer`: one level after the other."""
        self._refused = {}
        hierarchy, rounds = self._hierarchy()
        for at, one in enumerate(rounds):
            if at > 0:
                one.send()
                yield
            site, index = self._size(at), hierarchy.levels[at].replica
            first = self._rank - index * site - self._rank % site
            self._refused |= {first + number * site: 1 for number in one.receive()}

    def step(self, lr: float) -> None:
        """Apply what is due at all levels, which is waited for."""
        for _ in self.stages(lr):
            pass

    def settle(self) -> None:
        """Wait until nothing is under way between ranks; results stay to be received."""
        for one in self._made[1] if self._made is not None else ():
            one.settle()

    def plain(self) -> None:
        """Give the model the parameters that all ranks share."""
        self._hierarchy()[0].put_shared()

    def plain_shards(self) -> Mapping[str, Tensor]:
        """The parameters that all ranks share."""
        return self._hierarchy()[0].plain()

    def momentum(self) -> Mapping[str, Tensor]:
        """What the outermost level keeps of momentum, or as feedback, of what was not sent."""
        kept: dict[str, Tensor] = {}
        for fragment in self._made[0].levels[-1].fragments if self._made is not None else ():
            kept |= fragment.momentum()
        return kept

    def state(self) -> dict[str, Piece]:
        """All that this rank has, what levels share included, and messages in flight."""
        tensors: list[Tensor] = []
        packed = msgspec.json.encode(skeleton(self._hierarchy()[0].state_dict(), tensors))
        pieces = {f"method/{at}": Piece(tensor) for at, tensor in enumerate(tensors)}
        return {**pieces, "method": Piece(torch.frombuffer(bytearray(packed), dtype=torch.uint8))}

    def load(self, reader: Reader, *, is_new: bool) -> None:
        """Take up what `state` gave; a collective of all ranks.

        Raises:
            ValueError: of a replica that was not there, or another number of them.
        """
        if is_new:
            raise ValueError(
                "--resume: the replicas of --levels are those that there were; give as many"
            )
        hierarchy, rounds = self._hierarchy()
        packed = msgspec.json.decode(bytes(reader.tensor("optimizer/method").tolist()))
        state: dict[str, Any] = filled(packed, reader)
        # Whether it is of this run the core has looked at, by flags; a fork may have other rates.
        for saved, replica in zip(state["levels"], hierarchy.levels, strict=False):
            saved["method"] = repr(replica.method)
        hierarchy.load_state_dict(state)
        for one in rounds:
            one.resume()
