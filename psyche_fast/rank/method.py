"""`--method`: an optimiser for any of `psyche_fast.methods`, behind the face of the others."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor

from psyche_fast import config
from psyche_fast.methods import (
    SGD,
    AdamW,
    Method,
    Muon,
    Nesterov,
    Replica,
    Rounds,
    Sign,
    get,
)
from psyche_fast.methods.traffic import ways
from psyche_fast.options import flag
from psyche_fast.rank.clock import Transfer
from psyche_fast.rank.hub import Here, Peers
from psyche_fast.rank.optimizers import Optimizer
from psyche_fast.rank.state import Piece, Reader
from psyche_fast.sharding import local_tensor

_FIELDS = {
    "every": "every", "fragments": "fragments", "delay": "delay", "topk": "k", "chunk": "chunk",
    "values": "values", "beta": "decay", "subtract": "subtract", "merge": "merge",
    "norm_clip": "clip", "reduce": "reduce",
}  # fmt: skip
"""Flags, and the fields of a method that they set."""


def method_of(run: config.RunConfig) -> Method | None:
    """The method that a run's options name, but for DisTrO, whose options are its own.

    Local steps and AdamW on the mean of gradients have AdamW's options, and the weight decay is
    that of the run.

    Raises:
        ValueError: options that do not go together.
        TypeError: likewise.
    """
    options, name = run.exchange, run.exchange.method
    if name is None or run.optimizer.distro:
        return None
    try:
        return method_by(name, options, run.optimizer)
    except (TypeError, ValueError) as error:
        raise type(error)(f"--method {name}: {error}") from error


def method_by(name: str, options: config.Exchange, optimizer: config.Optimizer) -> Method:
    """A method by its name and options, with a run's AdamW and weight decay.

    Raises:
        ValueError: options that do not go together.
        TypeError: likewise.
    """
    method = get(name)
    given = {f: getattr(options, n) for n, f in _FIELDS.items()}
    changes: dict[str, Any] = {f: value for f, value in given.items() if value is not None}
    if options.mix is not None:
        try:
            changes["mix"] = options.mix if options.mix == "rebase" else float(options.mix)
        except ValueError:
            raise ValueError(f"--mix: wanted a number or rebase, got {options.mix!r}") from None
    adamw = AdamW(
        betas=(optimizer.beta1, optimizer.beta2), eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
    )  # fmt: skip
    ours: dict[str, Any] = {"inner": method.inner, "outer": method.outer}
    for role, step in ours.items():
        if isinstance(step, AdamW):
            changes[role] = adamw
        elif isinstance(step, Muon):
            changes[role] = replace(step, weight_decay=optimizer.weight_decay, adamw=adamw)
        elif isinstance(step, Sign | SGD | Nesterov) and not method.is_local:
            changes[role] = replace(step, weight_decay=optimizer.weight_decay)
    for name, field in (("outer_rate", "rate"), ("outer_momentum", "momentum")):
        value = getattr(options, name)
        outer = changes.get("outer", method.outer)
        if value is None:
            continue
        if isinstance(outer, Nesterov) or (isinstance(outer, SGD) and field == "rate"):
            changes["outer"] = replace(outer, **{field: value})
        else:
            raise ValueError(f"its outer step, {type(outer).__name__}, has no {flag(name)}")
    return replace(method, **changes)


class MethodOptimizer(Optimizer):
    """A `Replica` of a method; local steps end rounds, and rounds the outer steps.

    Between `plain` and the next `look_ahead` the model's parameters are those that all replicas
    share.

    Args:
        parameters: by name, whole or shards.
        method: the method.
        peers: this rank's counterparts in the other replicas; None for one replica.
        masters: fp32 copies of parameters of narrower types by name, to which steps are added.
        undecayed: names of the parameters without weight decay.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        method: Method,
        peers: dist.ProcessGroup | Peers | None,
        masters: Mapping[str, Tensor] | None = None,
        undecayed: Container[str] = (),
    ) -> None:
        self._parameters, self._method = parameters, method
        self._peers, self._masters, self._undecayed = peers, masters, undecayed
        self._made: tuple[Replica, Rounds | Here] | None = None
        self._sent = self._received = 0
        self._refused: dict[int, int] = {}

    @property
    def bytes_sent(self) -> int:
        """What this rank has handed over in the last step, 0 after a step without a message."""
        return self._sent

    @property
    def bytes_received(self) -> int:
        """What comes from other replicas by this step's message."""
        return self._received

    @property
    def transfers(self) -> Sequence[Transfer]:
        """See `Optimizer`."""
        if not self._sent:
            return ()
        around = ways(self._method, self._replica()[0].replicas)
        return [Transfer(self._sent, self._received, self._method.delay, around)]

    @property
    def refused_results(self) -> dict[int, int]:
        """Replicas whose results were refused in the last `step`."""
        return self._refused

    def _replica(self) -> tuple[Replica, Rounds | Here]:
        """Made of the parameters that a checkpoint may have brought; a collective at first."""
        if self._made is None:
            peers, place = self._peers, (0, 1)
            if isinstance(peers, Peers):
                place = peers.rank, peers.replicas
            elif peers is not None:
                place = dist.get_rank(peers), dist.get_world_size(peers)
            replica = Replica(
                self._method,
                self._parameters,
                replica=place[0],
                replicas=place[1],
                masters=self._masters,
                undecayed=self._undecayed,
            )
            rounds = peers.rounds(replica) if isinstance(peers, Peers) else Rounds(replica, peers)
            self._made = replica, rounds
        return self._made

    def look_ahead(self, prev_lr: float) -> None:
        """Give the model the replica's own parameters again, where the gradient is wanted."""
        replica, _ = self._replica()
        replica.before_forward(replica.step)

    def after_backward(self, prev_lr: float, lr: float, factor: Tensor) -> None:
        """The local step; what it ends is sent on its way."""
        replica, rounds = self._replica()
        replica.local(lr, factor)
        before = rounds.bytes_sent, rounds.bytes_received
        rounds.send()
        self._sent = rounds.bytes_sent - before[0]
        self._received = rounds.bytes_received - before[1]

    def step(self, lr: float) -> None:
        """Apply what is due, which is waited for."""
        _, rounds = self._replica()
        self._refused = dict.fromkeys(rounds.receive(), 1)

    def settle(self) -> None:
        """Wait until nothing is under way between replicas; results stay to be received."""
        if self._made is not None:
            self._made[1].settle()

    def plain(self) -> None:
        """Give the model the parameters that all replicas share."""
        replica, _ = self._replica()
        replica.put_shared()

    def plain_shards(self) -> Mapping[str, Tensor]:
        """This rank's parts of what all replicas share, where the replica's own are others."""
        replica, _ = self._replica()
        if not (self._method.is_local or self._method.lookahead):
            return {}
        return {name: local_tensor(p) for name, p in replica.plain().items()}

    def momentum(self) -> Mapping[str, Tensor]:
        """What is kept of momentum, or as feedback, of what was not sent."""
        if self._made is None:
            return {}
        kept: dict[str, Tensor] = {}
        for fragment in self._made[0].fragments:
            kept |= fragment.momentum()
        return kept

    def state(self) -> dict[str, Piece]:
        """All that this rank has, the shared parameters included, and messages in flight."""
        replica, _ = self._replica()
        tensors: list[Tensor] = []
        packed = msgspec.json.encode(skeleton(replica.state_dict(), tensors))
        pieces = {f"method/{at}": Piece(tensor) for at, tensor in enumerate(tensors)}
        return {**pieces, "method": Piece(torch.frombuffer(bytearray(packed), dtype=torch.uint8))}

    def load(self, reader: Reader, *, is_new: bool) -> None:
        """Take up what `state` gave; a collective of all replicas.

        Raises:
            ValueError: of a replica that was not there, another number of replicas, or of ranks of
                each.
        """
        if is_new:
            raise ValueError(
                "--resume: a --method's replicas are those that there were; give as many --replicas"
            )
        replica, rounds = self._replica()
        packed = msgspec.json.decode(bytes(reader.tensor("optimizer/method").tolist()))
        state = filled(packed, reader)
        # Whether it is of this run the core has looked at, by flags; a fork may have other rates.
        replica.load_state_dict({**state, "method": repr(self._method)})
        rounds.resume()


def skeleton(value: Any, tensors: list[Tensor]) -> Any:
    """A state as JSON: each dict its pairs, a list its items, a tensor its number."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return {"tensor": len(tensors) - 1}
    if isinstance(value, Mapping):
        return {"dict": [[key, skeleton(v, tensors)] for key, v in value.items()]}
    if isinstance(value, list | tuple):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [skeleton(v, tensors) for v in value]}
    return value


def filled(value: Any, reader: Reader) -> Any:
    """What `skeleton` was made of."""
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return reader.tensor(f"optimizer/method/{content}")
    if kind == "dict":
        return {key: filled(v, reader) for key, v in content}
    items = [filled(v, reader) for v in content]
    return tuple(items) if kind == "tuple" else items
