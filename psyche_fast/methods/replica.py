"""`Replica`: one replica's part of a method, from gradients to messages and back."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from psyche_fast.kernels.apply import apply, lookahead
from psyche_fast.methods.chunked import Fragment, side_by_side
from psyche_fast.methods.message import Format, Picked
from psyche_fast.methods.method import Method, Sign
from psyche_fast.methods.owners import Owners, are_owned
from psyche_fast.methods.steps import OuterStep, copied, optimizer_of, set_rate

_LAYER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")

Faults = dict[int, str]
"""What is wrong with messages, by the numbers of the replicas that sent them."""


@dataclass
class Sent:
    """A message whose results have not been applied.

    Attributes:
        step: how many steps had been made when it was sent.
        turn: number of its round.
        message: uint8 `[size]`.
        local: the replica's parameters at that time by name; for `mix="rebase"` with a delay.
    """

    step: int
    turn: int
    message: Tensor
    local: dict[str, Tensor]


class Replica:
    """One replica of a model in a method's loop, which is the same for all methods.

    ::

        replica.before_forward(step)             # steps count from 0
        ...                                      # forward, backward: gradients in .grad
        replica.local(lr)
        message = replica.send()                 # None where this step ends no round
        if message is not None:
            pending.append(exchange(message))    # `Rounds` is all this between processes
        while replica.due():
            replica.receive(pending.popleft())   # of all replicas, or of owners

    Replicas whose parameters were equal at first, that receive the same messages in the same order
    on the same kind of device, agree on the shared parameters (`plain`) to the bit.

    Arithmetic is in float32, in float64 for float64 parameters. The shared parameters are the
    parameters themselves where replicas do not differ from them: else, and for narrower types
    (which local steps do not take, since what AdamW changes would be lost to rounding), a copy.
    With float32 parameters and a DCT, directions of `Sign` are `psyche_fast.integers`' and DisTrO
    is `psyche_fast.Distro` to the bit.

    Args:
        method: the method.
        parameters: by name; all that are given are trained. Equal on all replicas.
        replica: this replica's number.
        replicas: how many there are.
        inner: an optimiser of the parameters that takes the local steps in the method's place.
        undecayed: names of parameters without weight decay.
        backend: "auto", "triton", "torch" or "interpret".

    Attributes:
        step: how many steps have been made.
        fragments: the parts that take turns, with their layouts and messages.
        outer: the outer step.
        inner: the optimiser of the local steps, or None.

    Raises:
        TypeError: a parameter is sharded or not of floating point.
        ValueError: no parameters, more fragments than layers, or bfloat16 parameters for local
            steps.
    """

    def __init__(
        self,
        method: Method,
        parameters: Mapping[str, Tensor],
        *,
        replica: int,
        replicas: int,
        inner: torch.optim.Optimizer | None = None,
        undecayed: Container[str] = (),
        backend: str = "auto",
    ) -> None:
        if not 0 <= replica < replicas:
            raise ValueError(f"replica must be from 0 to {replicas - 1}, got {replica}")
        self.method, self.replica, self.replicas = method, replica, replicas
        self.step = 0
        self._parameters = dict(sorted(parameters.items()))
        _check_parameters(method, self._parameters)
        self._local = {name: p.detach() for name, p in self._parameters.items()}
        self._is_apart = method.is_local or method.lookahead
        self._shared = {
            name: p.to(_wide(p), copy=True) if self._is_apart or p.dtype != _wide(p) else p
            for name, p in self._local.items()
        }
        self.fragments = [
            Fragment(method, number, names, [self._shared[n] for n in names], backend)
            for number, names in enumerate(fragment_names(method, list(self._shared)))
        ]
        if are_owned(method, replicas):
            for fragment in self.fragments:
                fragment.divide(replica, replicas)
        self.outer = OuterStep(method, self._shared, undecayed)
        if inner is not None and not method.is_local:
            raise ValueError(f"what={method.what!r} takes no local steps: there is no inner")
        self.inner, self._owns_inner = inner, inner is None
        if inner is None and method.inner is not None:
            self.inner = optimizer_of(method.inner, self._parameters, undecayed)
        self._rate: float | None = None
        self._sent: deque[Sent] = deque()

    @property
    def layout(self) -> list[Any]:
        """How each fragment's parameters are cut: a `Layout` of each."""
        return [fragment.layout for fragment in self.fragments]

    def bytes_sent(self, step: int) -> int:
        """Size of the message that ends step `step` (from 0), 0 where there is none."""
        turn = self._turn(step + 1)
        return 0 if turn is None else self.fragments[turn % len(self.fragments)].format.size

    @torch.no_grad()
    def before_forward(self, step: int) -> None:
        """Bring the parameters to where the gradient is wanted.

        Args:
            step: number of the step, from 0.

        Raises:
            ValueError: it is not this replica's next one.
        """
        if step != self.step:
            raise ValueError(f"step: this replica's next one is {self.step}, got {step}")
        if not self.method.lookahead:
            return
        for fragment in self.fragments:
            assert fragment.kept is not None
            for at, plan in enumerate(fragment.layout.plans):
                names = [fragment.names[m.position] for m in plan.members]
                lookahead(
                    plan, [self._shared[n] for n in names], fragment.kept[at],
                    [self._rate or 0.0] * len(names), [self._local[n] for n in names],
                    backend=fragment.backends[at],
                )  # fmt: skip

    @torch.no_grad()
    def local(self, lr: float, clip: Tensor | float | None = None) -> None:
        """Take up the gradients: the local step, or later `send`'s.

        Args:
            lr: the schedule's learning rate of this step.
            clip: factor on the gradients. Where it is not finite they are left out whole; without
                one they are where an element of them is not.
        """
        self._rate = float(lr)
        self.step += 1
        if clip is None:
            gradients = [p.grad for p in self._parameters.values() if p.grad is not None]
            clip = 1.0 if all(bool(g.isfinite().all()) for g in gradients) else float("nan")
        self._clip = clip
        if not self.method.is_local:
            self.outer.decay(self._rate)
            return
        assert self.inner is not None
        factor = float(clip)
        if factor - factor != 0.0:  # not finite
            return
        for p in self._parameters.values():
            if factor != 1.0 and p.grad is not None:
                p.grad.mul_(factor)
        set_rate(self.inner, self._rate)
        self.inner.step()

    def stepped(self) -> None:
        """In place of `local`, where the inner optimiser's step has been made by its owner."""
        assert self.method.is_local
        self.step += 1

    @torch.no_grad()
    def send(self) -> Tensor | None:
        """The message of this step, uint8 `[size]`; None where it ends no round."""
        turn = self._turn(self.step)
        if turn is None:
            return None
        fragment = self.fragments[turn % len(self.fragments)]
        factor, scale = 1.0, None
        sources: list[Tensor | None]
        if self.method.is_local:
            own = [self._local[n] for n in fragment.names]
            sources = list(torch._foreach_sub([self._shared[n] for n in fragment.names], own))
        else:
            sources = [self._parameters[n].grad for n in fragment.names]
            sources = [None if s is None else s.detach() for s in sources]
            scale = self._clip
            if self.method.what == "momentum":
                assert self._rate is not None
                gains = {"rate": self._rate, "one": 1.0, "ema": 1.0 - self.method.decay}
                factor = gains[self.method.gain]
        if isinstance(scale, float) and scale == 1.0:
            scale = None
        message = fragment.compress(sources, factor, scale, turn, self.replica)
        local = {}
        if self.method.mix == "rebase" and self.method.delay > 0:
            local = {name: self._local[name].clone() for name in fragment.names}
        self._sent.append(Sent(self.step, turn, message, local))
        return message

    def due(self) -> bool:
        """Whether the next thing to do is `receive`."""
        return bool(self._sent) and self.step >= self._sent[0].step + self.method.delay

    def faults(self, messages: Tensor) -> Faults:
        """What is wrong with the next messages' headers or checksums.

        That is all that damage on the way can do, and may befall one receiver alone: where
        messages travel, replicas agree on what to leave out before they `receive`.

        Args:
            messages: uint8 `[replicas, size]`.

        Raises:
            ValueError: messages of another shape or dtype.
        """
        sent = self._sent[0]
        return self._fragment(sent).format.faults(sent.turn, messages)

    @torch.no_grad()
    def receive(self, messages: Tensor, leave_out: Faults | None = None) -> Faults:
        """Apply the results of the oldest message: the outer step, and the mix.

        Where nothing is left of them, the shared parameters stay as they are, and the mix is made
        all the same.

        Args:
            messages: uint8 `[replicas, size]`, in the order of replicas, the own one among them.
            leave_out: those that all replicas have agreed to refuse; those that `faults` sees where
                None.

        Returns:
            What has been refused, the same on all replicas that were given the same.

        Raises:
            ValueError: messages of another shape or dtype, or nothing is due.
        """
        if not self.due():
            raise ValueError(f"receive: nothing is due after {self.step} steps")
        refused = dict(self.faults(messages) if leave_out is None else leave_out)
        sent = self._sent.popleft()
        fragment = self._fragment(sent)
        rows = messages.to(fragment.layout.plans[0].device)
        picked, faults = fragment.format.unpack(rows, refused)
        if picked is not None:
            self._apply(fragment, picked, sent.turn)
        for name in fragment.names:
            self._mix(name, sent)
        fragment.format.received(sent.turn)
        return refused | faults

    def plain(self) -> Mapping[str, Tensor]:
        """The shared parameters by name, not copies: to evaluate, to export, to compare.

        Parameters of narrower types as the float32 that they are rounded from.
        """
        return self._shared

    def flight(self, at: int = -1) -> tuple[Format | Owners, int]:
        """Of a message whose results are to come, the newest or `at`: its format and its round."""
        sent = self._sent[at]
        return self._fragment(sent).format, sent.turn

    def in_flight(self) -> list[Tensor]:
        """The own messages whose results are to come, the oldest first.

        After `load_state_dict` the replicas exchange them again.
        """
        return [sent.message for sent in self._sent]

    def state_dict(self) -> dict[str, Any]:
        """Everything for an exact resume at any step, own messages in flight included; copies.

        Own to this replica are `local`, `fragments`, `inner` and `in_flight`.
        """
        state: dict[str, Any] = {
            "method": repr(self.method),
            "replica": self.replica,
            "replicas": self.replicas,
            "step": self.step,
            "rate": self._rate,
            "shared": copied(self._shared),
            "local": copied(self._local) if self.method.is_local else {},
            "outer": self.outer.state(),
            "fragments": [fragment.state() for fragment in self.fragments],
            "in_flight": [copied(vars(sent)) for sent in self._sent],
        }
        if self.inner is not None and self._owns_inner:
            state["inner"] = copied(self.inner.state_dict())
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` gave, parameters included.

        Raises:
            ValueError: it is of another method, number of replicas or model.
        """
        mine = {"method": repr(self.method), "replica": self.replica, "replicas": self.replicas}
        for key, wanted in mine.items():
            if state.get(key) != wanted:
                raise ValueError(f"saved {key}: wanted {wanted}, got {state.get(key)}")
        for kind, tensors in (("shared", self._shared), ("local", self._local)):
            saved = state[kind]
            if kind == "local" and not self.method.is_local:
                continue
            for name in sorted(set(saved) ^ set(tensors)):
                raise ValueError(f"parameter {name} is in the saved state or the model alone")
            for name, tensor in tensors.items():
                if saved[name].shape != tensor.shape:
                    raise ValueError(
                        f"parameter {name}: saved {list(saved[name].shape)}, here "
                        f"{list(tensor.shape)}"
                    )
                tensor.copy_(saved[name])
        if not self.method.is_local:
            torch._foreach_copy_(list(self._local.values()), list(self._shared.values()))
        for fragment, saved in zip(self.fragments, state["fragments"], strict=True):
            fragment.load(saved)
        self.outer.load(state["outer"])
        if self.inner is not None and self._owns_inner:
            self.inner.load_state_dict(copied(state["inner"]))
        self.step, self._rate = state["step"], state["rate"]
        self._sent = deque(Sent(**copied(sent)) for sent in state["in_flight"])

    def _turn(self, step: int) -> int | None:
        """The number of the round whose message is sent after so many steps."""
        if not self.method.is_local:
            return step - 1
        turn, left = divmod(step + self.method.delay, self.method.window)
        return turn - 1 if left == 0 else None

    def _fragment(self, sent: Sent) -> Fragment:
        return self.fragments[sent.turn % len(self.fragments)]

    def _apply(self, fragment: Fragment, picked: list[Picked], turn: int) -> None:
        """The outer step of a fragment."""
        method, rate = self.method, self._rate or 0.0  # none where others take the local steps
        if method.clip == "median":
            picked = fragment.clipped(picked)
        if self._signs_in_integers(fragment):
            for at, (plan, p) in enumerate(zip(fragment.layout.plans, picked, strict=True)):
                names = [fragment.names[m.position] for m in plan.members]
                apply(
                    plan, [self._shared[n] for n in names], side_by_side(plan, p),
                    [rate] * len(names), backend=fragment.backends[at],
                )  # fmt: skip
            return
        merged = fragment.merge(picked, turn)
        self.outer.step(dict(zip(fragment.names, merged, strict=True)), rate)

    def _signs_in_integers(self, fragment: Fragment) -> bool:
        method, plans = self.method, fragment.layout.plans
        if not isinstance(method.outer, Sign) or method.merge != "named" or method.clip != "none":
            return False
        return all(plan.is_transformed and plan.dtype == torch.float32 for plan in plans)

    def _mix(self, name: str, sent: Sent) -> None:
        """A parameter of the replica's own, once the shared one has changed."""
        local, shared, mix = self._local[name], self._shared[name], self.method.mix
        if not self.method.is_local:
            if local is not shared and not self.method.lookahead:
                local.copy_(shared)  # a narrower type
        elif mix == "rebase" and sent.local:
            local.sub_(sent.local[name]).add_(shared)
        elif mix == "rebase" or mix == 0.0:
            local.copy_(shared)
        else:
            local.mul_(mix).add_(shared, alpha=1.0 - mix)


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


def _check_parameters(method: Method, parameters: Mapping[str, Tensor]) -> None:
    if not parameters:
        raise ValueError("parameters: wanted some, got none")
    for name, p in parameters.items():
        if isinstance(p, DTensor):
            raise TypeError(f"parameter {name} is sharded (a DTensor), which methods do not take")
        if not p.is_floating_point():
            raise TypeError(f"parameter {name} must be floating point, got {p.dtype}")
        if method.is_local and p.dtype != _wide(p):
            raise ValueError(
                f"parameter {name} is {p.dtype}: local steps are lost to its rounding; wanted "
                "float32, with mixed precision for the forward"
            )


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
