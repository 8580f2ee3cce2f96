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
from psyche_fast.options import flag
from psyche_fast.rank.clock import Transfer
from psyche_fast.rank.hub import Here, Peers
from psyche_fast.rank.optimizers import Optimizer
from psyche_fast.rank.state import Piece, Reader

_FIELDS = {
    "every": "every", "fragments": "fragments", "delay": "delay", "topk": "k", "chunk": "chunk",
    "values": "values", "beta": "decay", "subtract": "subtract", "merge": "merge",
    "norm_clip": "clip",
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
        return _method_of(name, options, run.optimizer)
    except (TypeError, ValueError) as error:
        raise type(error)(f"--method {name}: {error}") from error


def _method_of(name: str, options: config.Exchange, optimizer: config.Optimizer) -> Method:
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
        parameters: by name; float32, whole.
        method: the method.
        peers: this rank's counterparts in the other replicas; None for one replica.
        undecayed: names of the parameters without weight decay.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        method: Method,
        peers: dist.ProcessGroup | Peers | None,
        undecayed: Container[str] = (),
    ) -> None:
        self._parameters, self._method = parameters, method
        self._peers, self._undecayed = peers, undecayed
        self._made: tuple[Replica, Rounds | Here] | None = None
        self._aside: list[Tensor] | None = None  # the replica's own, while the model has the shared
        self._sent = 0
        self._refused: dict[int, int] = {}

    @property
    def bytes_sent(self) -> int:
        """Size of this rank's last message, 0 after a step without one."""
        return self._sent

    @property
    def transfers(self) -> Sequence[Transfer]:
        """See `Optimizer`."""
        if not self._sent:
            return ()
        others = self._replica()[0].replicas - 1
        return [Transfer(self._sent, self._sent * others, self._method.delay)]

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
                undecayed=self._undecayed,
            )
            rounds = peers.rounds(replica) if isinstance(peers, Peers) else Rounds(replica, peers)
            self._made = replica, rounds
        return self._made

    def look_ahead(self, prev_lr: float) -> None:
        """Give the model the replica's own parameters again, where the gradient is wanted."""
        replica, _ = self._replica()
        self._own()
        replica.before_forward(replica.step)

    def after_backward(self, prev_lr: float, lr: float, factor: Tensor) -> None:
        """The local step; what it ends is sent on its way."""
        replica, rounds = self._replica()
        replica.local(lr, factor)
        self._sent = rounds.send()

    def step(self, lr: float) -> None:
        """Apply what is due, which is waited for."""
        _, rounds = self._replica()
        self._refused = dict.fromkeys(rounds.receive(), 1)

    @torch.no_grad()
    def plain(self) -> None:
        """Give the model the parameters that all replicas share."""
        replica, _ = self._replica()
        if self._aside is None:
            self._aside = [p.detach().clone() for p in self._parameters.values()]
            for name, p in self._parameters.items():
                p.copy_(replica.plain()[name])

    @torch.no_grad()
    def _own(self) -> None:
        if self._aside is not None:
            torch._foreach_copy_([p.detach() for p in self._parameters.values()], self._aside)
            self._aside = None

    def plain_shards(self) -> Mapping[str, Tensor]:
        """The parameters that all replicas share, where the replica's own are others."""
        replica, _ = self._replica()
        return replica.plain() if self._method.is_local or self._method.lookahead else {}

    def momentum(self) -> Mapping[str, Tensor]:
        """What is kept of momentum, or as feedback, of what was not sent."""
        if self._made is None:
            return {}
        kept: dict[str, Tensor] = {}
        for fragment in self._made[0].fragments:
            kept |= fragment.state().get("kept", {})
        return kept

    def state(self) -> dict[str, Piece]:
        """All that the replica has, the shared parameters included, and messages in flight."""
        replica, _ = self._replica()
        was_plain = self._aside is not None
        self._own()
        tensors: list[Tensor] = []
        skeleton = msgspec.json.encode(_skeleton(replica.state_dict(), tensors))
        if was_plain:
            self.plain()
        pieces = {f"method/{at}": Piece(tensor) for at, tensor in enumerate(tensors)}
        return {**pieces, "method": Piece(torch.frombuffer(bytearray(skeleton), dtype=torch.uint8))}

    def load(self, reader: Reader, *, is_new: bool) -> None:
        """Take up what `state` gave; a collective of all replicas.

        Raises:
            ValueError: of a replica that was not there, or another number of replicas.
        """
        if is_new:
            raise ValueError(
                "--resume: a --method's replicas are those that there were; give as many --replicas"
            )
        replica, rounds = self._replica()
        skeleton = msgspec.json.decode(bytes(reader.tensor("optimizer/method").tolist()))
        state = _filled(skeleton, reader)
        # Whether it is of this run the core has looked at, by flags; a fork may have other rates.
        replica.load_state_dict({**state, "method": repr(self._method)})
        self._aside = None
        rounds.resume()


def _skeleton(value: Any, tensors: list[Tensor]) -> Any:
    """A state as JSON: each dict its pairs, a list its items, a tensor its number."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return {"tensor": len(tensors) - 1}
    if isinstance(value, Mapping):
        return {"dict": [[key, _skeleton(v, tensors)] for key, v in value.items()]}
    if isinstance(value, list | tuple):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_skeleton(v, tensors) for v in value]}
    return value


def _filled(value: Any, reader: Reader) -> Any:
    """What `_skeleton` was made of."""
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return reader.tensor(f"optimizer/method/{content}")
    if kind == "dict":
        return {key: _filled(v, reader) for key, v in content}
    items = [_filled(v, reader) for v in content]
    return tuple(items) if kind == "tuple" else items
